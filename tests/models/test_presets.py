import pytest

from ring_attention.checks import ConfigError
from ring_attention.models.hf.presets import PRESETS, REFUSED
from ring_attention.training.flags import load_config

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 2_950_272,  # without the vision tower and its projection
    "gemma-3-12b": 12_187_325_040 - 416_866_032 - 4_424_832,
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - 6_194_304,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "ministral-8b": 8_019_808_256,
    "mistral-small-24b": 23_572_403_200,
    "smollm3-3b": 3_075_098_624,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "granite-3.1-2b": 2_533_531_648,
    "granite-3.1-8b": 8_170_848_256,
    "command-r7b": 8_028_033_024,
}
"""Name -> parameters that the page of the model's repository states for its safetensors files; from "ministral-8b" on,
those that the model has which transformers builds of the same values."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_of_its_model(name):
    model = load_config(name).model
    assert model.compute_dtype == "bfloat16"
    assert model.num_parameters == PARAMETERS[name]


def test_the_config_of_gemma_3_is_that_of_its_config_json():
    named, ours = load_config("gemma-3-27b"), load_config("configs/gemma3_27b.py")
    assert named.transformer == ours.transformer
    assert named.attention == ours.attention


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_nothing_here_is_like_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=f"--config={name}: is a mixture of experts.*choose one of llama"):
        load_config(name)


def test_a_misspelt_preset_is_recognised():
    with pytest.raises(ConfigError, match=r"did you mean llama-3\.1-8b\?"):
        load_config("llama-3.1-8")


def test_layers_without_positions_are_those_that_their_makers_say():
    smollm3, command = (load_config(name).transformer for name in ("smollm3-3b", "command-r7b"))
    for model, window in ((smollm3, 0), (command, 4096)):
        kinds = [run.kind for run in model.loop.periodic for _ in range(run.length)]
        assert [kind.rope.fraction for kind in kinds] == [1.0, 1.0, 1.0, 0.0]
        assert [kind.window for kind in kinds] == [window] * 3 + [0]


def test_phi_4_mini_turns_three_quarters_of_a_head_by_longrope():
    rope = load_config("phi-4-mini").model.rope
    assert (rope.rotary_dim(128), rope.factor, rope.original_len) == (96, 32.0, 4096)
    assert rope.magnitude == pytest.approx(1.190238, abs=1e-6)
    assert len(rope.long_factors) == len(rope.short_factors) == 48
