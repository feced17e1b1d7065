import json
import subprocess
import sys

import pytest

from ring_attention.checks import ConfigError
from ring_attention.training.config_values import config_from_dict, config_to_dict, field_kinds
from ring_attention.training.flags import parse_config, parse_processes, usage

CONFIG = '''"""Tiny: `python train.py`, a minute on a laptop."""
from ring_attention.models.config import ModelConfig
from ring_attention.training.config import OptimizerConfig, TrainConfig


def get_config():
    model = ModelConfig(
        vocab_size=264, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64
    )
    return TrainConfig(
        name="tiny", model=model, seq_len=512, num_steps=200, optimizer=OptimizerConfig(learning_rate=1)
    )
'''


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """A working directory with configs/tiny.py, configs/small.py and broken ones."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, text in {
        "tiny": CONFIG,
        "small": CONFIG.replace('"tiny"', '"small"'),
        "empty": "",
        "constant": "get_config = 3",
        "other": "def get_config():\n    return {'name': 'other'}",
        "raising": "def get_config():\n    raise KeyError('no\\nsuch corpus')",
        "importing": "import no_such_module",
        "broken": "def get_config(:\n",
        "refused": CONFIG.replace("num_layers=2", "num_layers=-2"),
        "mistyped": CONFIG.replace("seq_len=512", "seq_len=512.0"),
    }.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def parse(*argv):
    return parse_config(list(argv), "configs/tiny.py")


BAD = [
    # an unknown field
    (["--config.model.num_layer=4"], ["model.num_layer='4'", "did you mean model.num_layers?", "ffn_dim"]),
    (["--config.model.num_layer", "4"], ["model.num_layer='4'", "did you mean model.num_layers?"]),
    (["--config.num_layers=4"], ["num_layers='4'", "did you mean model.num_layers?", "seq_len"]),
    (["--config.modle.num_layers=4"], ["modle.num_layers='4'", "did you mean model.num_layers?", "optimizer"]),
    (["--config.optimizer.zzz=4"], ["optimizer.zzz='4'", "no such field", "learning_rate"]),
    (["--config.model.num_layers.x=4"], ["model.num_layers.x='4'", "did you mean model.num_layers?"]),
    (["--config.model=4"], ["model='4'", "is a section", "num_layers"]),
    # a value of another type
    (["--config.model.num_layers=four"], ["model.num_layers='four'", "whole number", "num_layers=2"]),
    (["--config.model.num_layers=2.5"], ["model.num_layers='2.5'", "whole number", "num_layers=2"]),
    (["--config.model.num_layers=True"], ["model.num_layers='True'", "whole number", "num_layers=2"]),
    (["--config.num_steps=1e5"], ["num_steps='1e5'", "whole number", "num_steps=200"]),
    (["--config.num_steps="], ["num_steps=''", "whole number", "num_steps=200"]),
    (["--config.optimizer.b1=high"], ["optimizer.b1='high'", "finite number", "b1=0.9"]),
    (["--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate='nan'", "finite number"]),
    (["--config.optimizer.learning_rate=inf"], ["optimizer.learning_rate='inf'", "finite number"]),
    # a value that the config refuses
    (["--config.model.num_layers=0"], ["model.num_layers=0", "must be positive", "at least 1"]),
    (["--config.model.num_kv_heads=3"], ["model.num_kv_heads=3", "must divide model.num_heads=4", "set both"]),
    (["--config.attention.layout=ring"], ["attention.layout='ring'", "is not known", "zigzag"]),
    (["--config.mesh.sp", "-2"], ["mesh.sp=-2", "must be positive or -1", "use 1"]),
    (["--config.num_steps=50"], ["optimizer.warmup_steps=100", "num_steps=50", "shorten"]),
    # a config file that is not there or does not work
    (["--config=configs/tinny.py"], ["configs/tinny.py", "no such file", "did you mean tiny?", "configs/small.py"]),
    (["--config=elsewhere.py"], ["elsewhere.py", "no such file", "choose one of", "configs/tiny.py"]),
    (["--config=configs"], ["--config=configs:", "no such file", "configs/tiny.py"]),
    (["--config=configs/empty.py"], ["configs/empty.py", "defines no get_config", "add"]),
    (["--config=configs/constant.py"], ["configs/constant.py", "defines no get_config", "add"]),
    (["--config=configs/other.py"], ["configs/other.py", "returned dict", "TrainConfig"]),
    (["--config=configs/raising.py"], ["configs/raising.py", "KeyError", "such corpus", "correct the file"]),
    (["--config=configs/importing.py"], ["configs/importing.py", "no_such_module", "correct the file"]),
    (["--config=configs/broken.py"], ["configs/broken.py", "SyntaxError", "line 1", "correct the file"]),
    (["--config=configs/refused.py"], ["configs/refused.py", "model.num_layers=-2", "correct the file"]),
    (["--config=configs/mistyped.py"], ["seq_len=512.0", "is float", "whole number"]),
    # a flag that is none
    (["--num_layers=4"], ["--num_layers=4", "no such flag", "did you mean --config.model.num_layers?"]),
    (["--configs=configs/tiny.py"], ["--configs=configs/tiny.py", "no such flag", "did you mean --config?"]),
    (["--noconfig.seed"], ["--noconfig.seed", "no such flag", "--config.FIELD=VALUE"]),
    (["--undefok=x", "--x=1"], ["--undefok=x", "no such flag", "--config.FIELD=VALUE"]),
    (["--" + "a" * 1500], ["there is no such flag", "--config.FIELD=VALUE"]),
    (["--flagfile=f"], ["--flagfile=f", "no such flag", "--config.FIELD=VALUE"]),
    (["--config.num_steps"], ["--config.num_steps", "Missing value", "--config.FIELD=VALUE"]),
    (["--config"], ["--config", "Missing value", "--config=PATH"]),
    # a stray word
    (["configs/tiny.py"], ["'configs/tiny.py'", "not a flag", "--config=PATH"]),
    (["--config.seed=1", "stray", "--config.num_steps=300"], ["'stray'", "not a flag", "--config.FIELD=VALUE"]),
    (["--config.seed", "1", "2"], ["'2'", "not a flag", "--config.FIELD=VALUE"]),
    (["--", "stray"], ["'stray'", "not a flag", "--config=PATH"]),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_parse_config_refuses_bad_flags_in_one_line(argv, words):
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    message = str(error.value)
    assert "\n" not in message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in {message!r}"


@pytest.mark.parametrize("name", ["small", "small.py", "configs/small.py"])
def test_config_flag_takes_the_name_of_a_shipped_config(name):
    assert parse(f"--config={name}").name == "small"


def test_config_flag_prefers_a_file_to_a_shipped_config(configs):
    (configs.parent / "small").write_text(CONFIG.replace('"tiny"', '"here"'))
    assert parse("--config=small").name == "here"


def test_usage_gives_every_field_a_text_and_its_default():
    lines = usage("configs/tiny.py").splitlines()
    fields = {}
    for line in lines[lines.index("overrides them):") + 1 :]:
        if line.startswith("  --config."):
            head, _, default = line.strip().partition(", ")
            texts = fields[head.split()[0].removeprefix("--config.")] = [default]
        elif line:
            texts.append(line.strip())
    assert set(fields) == set(field_kinds())
    words = [" ".join(texts[1:]) for texts in fields.values()]
    assert all(words)
    assert len(set(words)) == len(words)
    assert fields["optimizer.learning_rate"][0] == "default 0.001"
    assert fields["attention.duplex"][0] == "default false"
    assert fields["run_dir"][0] == "default empty"
    assert fields["seq_len"][0] == "no default"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("flag", ["--flagfile=f", "--undefok=x", "-undefok=x"])
def test_parse_processes_refuses_flags_of_absl(flag):
    with pytest.raises(ConfigError, match="there is no such flag"):
        parse_processes([flag, "--x=1"])


def test_parse_processes_takes_its_flags_out_of_the_line():
    flags, rest = parse_processes(
        ["--config.seed", "1", "--num_processes=2", "--process_id", "1", "--coordinator_address=a:1"]
    )
    assert (flags.coordinator_address, flags.num_processes, flags.process_id) == ("a:1", 2, 1)
    assert rest == ["--config.seed", "1"]
    assert parse_processes([])[0].num_processes is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_processes=2"], ["--num_processes=2", "--coordinator_address and --process_id missing"]),
        (["--num_processes=2", "--process_id=2", "--coordinator_address=a:1"], ["--process_id=2", "[0, 2)"]),
        (["--num_processes=0", "--process_id=0", "--coordinator_address=a:1"], ["--num_processes=0", "positive"]),
        (
            ["--num_processes=2", "--process_id=1", "--coordinator_address=a"],
            ["--coordinator_address='a'", "host:port"],
        ),
        (["--num_processes=2", "--process_id=1", "--coordinator_address=a:x"], ["'a:x'", "host:port"]),
        (["--num_processes=two", "--process_id=1", "--coordinator_address=a:1"], ["num_processes", "two"]),
    ],
)
def test_parse_processes_refuses_what_does_not_fit(argv, words):
    with pytest.raises(ConfigError) as error:
        parse_processes(argv)
    assert "\n" not in str(error.value)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_override_reaches_its_fields_and_no_others():
    config = parse("--config.model.num_layers=4", "--config.mesh.sp", "8", "--config.name=a=b")
    assert (config.model.num_layers, config.mesh.sp, config.name) == (4, 8, "a=b")
    restored = parse("--config.model.num_layers=2", "--config.mesh.sp=-1", "--config.name=tiny")
    assert restored == parse() != config


def test_override_takes_the_last_of_two_equal_flags():
    config = parse("--config=configs/tiny.py", "--config.seed=1", "--config.seed=2", "--config=configs/small.py")
    assert (config.name, config.seed) == ("small", 2)


def test_config_flag_may_follow_an_override_in_two_words():
    config = parse("--config.seed", "1", "--config=configs/small.py")
    assert (config.name, config.seed) == ("small", 1)


def test_override_of_float_takes_fractions_where_file_has_int():
    rate = parse("--config.optimizer.learning_rate=0.5").optimizer.learning_rate
    unchanged = parse().optimizer.learning_rate
    assert (rate, unchanged, type(unchanged)) == (0.5, 1.0, float)


def test_parse_config_leaves_nothing_behind():
    assert parse("--config.seed=3").seed == 3
    assert parse().seed == 0


def test_parse_config_reads_an_edited_file_again(configs):
    assert parse().num_steps == 200
    (configs / "tiny.py").write_text(CONFIG.replace("num_steps=200", "num_steps=201"))
    assert parse().num_steps == 201


def test_usage_names_every_config_file_and_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text == usage("configs/tiny.py") + "\n"
    for words in ["configs/small.py", "a minute on a laptop", *(f"--config.{field}  " for field in field_kinds())]:
        assert words in text


def test_parse_config_refuses_before_jax_starts_a_backend():
    program = (
        "import sys; from ring_attention.training.flags import parse_config; import ring_attention.checks as checks\n"
        "try: parse_config(['--config.seed=x'], 'configs/tiny.py')\n"
        "except checks.ConfigError: pass\n"
        "from jax._src import xla_bridge; sys.exit(xla_bridge.backends_are_initialized())"
    )
    path = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_config_survives_json_bitwise():
    config = parse("--config.optimizer.learning_rate=0.1234567890123")
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": {}}, ["modle={}", "no such field", "model"]),
        ({"mesh": {"spp": 2}}, ["mesh.spp=2", "did you mean mesh.sp?"]),
        ({"mesh": 8}, ["mesh=8", "is a section"]),
        ({"seed": True}, ["seed=True", "is bool", "whole number"]),
        ({"seed": "1"}, ["seed='1'", "is str", "whole number"]),
        ({"optimizer": {"b1": float("nan")}}, ["optimizer.b1=nan", "finite number"]),
        ({"name": None}, ["name=None", "NoneType", "text"]),
        ({"model": {"vocab_size": 8}}, ["model.num_layers is missing", "no default"]),
    ],
)
def test_config_from_dict_names_the_wrong_field_with_dots(change, words):
    with pytest.raises(ConfigError) as error:
        config_from_dict(config_to_dict(parse()) | change)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_config_from_dict_takes_int_for_float():
    config = config_from_dict(config_to_dict(parse()) | {"optimizer": {"weight_decay": 1}})
    assert type(config.optimizer.weight_decay) is float
