"""What the planner advises: it fits, nothing that fits is faster, and what would be refused is not advised."""

import dataclasses
import itertools
import time

import pytest

from ring_attention.checks import ConfigError
from ring_attention.hardware.topology import find_topology
from ring_attention.models.config import REMAT_POLICIES
from ring_attention.planning import advice as advice_module
from ring_attention.planning import search
from ring_attention.planning.advice import ADVISED, advise
from ring_attention.planning.plan import EQUAL, by_strategy, candidate_of, make_plan, strategies_of
from ring_attention.planning.shares import Share
from ring_attention.training.config import MeshConfig
from ring_attention.training.config_values import config_to_dict
from ring_attention.training.flags import load_config, override

GPU, TPU = "gpu_8xh100_7b", "tpu_v5e_256_7b"


def small(seq_len=2**17, batch_size=2, **mesh):
    """A config of two key/value heads, so that all that it could be can be listed."""
    config = load_config(GPU)
    model = dataclasses.replace(config.model, num_kv_heads=2, num_heads=8, num_layers=8)
    changes = dict(model=model, mesh=MeshConfig(**mesh), batch_size=batch_size, seq_len=seq_len, eval_sequences=8)
    return dataclasses.replace(config, **changes)


def everything(config, topology):
    """Each mesh, strategy and setting that the pod can run, one after the other, nothing left out for being slower."""
    for mesh in search.meshes(config, topology):
        for remat, groups, steps, offload in itertools.product(
            REMAT_POLICIES,
            search.divisors(config.model.num_kv_heads),
            search.divisors(config.batch_size),
            search.OFFLOADS,
        ):
            setting = search.Setting(remat=remat, head_groups=groups, accumulation_steps=steps, offload=offload)
            try:
                share = Share.of(setting.of(dataclasses.replace(config, mesh=mesh)), topology)
            except ConfigError:
                continue
            yield from (by_strategy(share, strategy) for strategy in strategies_of(share))


@pytest.mark.parametrize("seq_len", [2**17, 2**22])
def test_no_way_that_fits_is_faster_than_what_is_advised(seq_len):
    config, topology = small(seq_len), find_topology("h100:1x4")
    advised = advise(config, topology).fastest
    times = [candidate_of(share).time.total for share in everything(config, topology) if search.fits(share)]
    assert advised.time.total <= min(times) * (1 + EQUAL)
    assert max(times) > 1.2 * min(times), "a control: otherwise any would do"


def test_the_longest_context_fits_and_no_way_holds_a_longer_one():
    config, topology = small(), find_topology("h100:1x4")
    tokens = advise(config, topology).longest.share.config.seq_len
    step = tokens // 32 // 2048 * 2048
    lengths = {n: dataclasses.replace(config, seq_len=tokens + n) for n in (0, step)}
    fit = {n: any(search.fits(share) for share in everything(longer, topology)) for n, longer in lengths.items()}
    assert fit == {0: True, step: False}


def test_what_is_advised_is_what_its_flags_say_and_fits():
    config, topology = small(2**22), find_topology("h100:1x4")
    advice = advise(config, topology)
    for name in ADVISED:
        candidate = getattr(advice, name)
        if candidate:
            assert config_to_dict(override(config, candidate.flags(config))) == config_to_dict(candidate.share.config)
            assert Share.of(candidate.share.config, candidate.share.topology).mesh == candidate.share.mesh
            assert search.fits(candidate.share)
    assert advice.fastest.share.config.batch_size == config.batch_size


def test_where_a_config_does_not_fit_the_one_thing_that_mends_it_is_named():
    config, topology = small(2**22, batch_size=1), find_topology("h100:1x4")
    assert not make_plan(config, topology).own.fits
    change = advise(config, topology).one_change
    fields = {flag.partition("=")[0].rpartition(".")[0] for flag in change.flags(config)}
    assert len(fields) == 1, "one section of the config: the mesh, the strategy, or a field"
    assert search.fits(change.share)
    assert advise(small(batch_size=1), topology).one_change is None


def test_where_nothing_fits_as_few_hosts_more_as_can_be_are_named():
    config, topology = small(2**26, batch_size=1), find_topology("h100:1x4")
    advice = advise(config, topology)
    assert (advice.fastest, advice.one_change) == (None, None)
    hosts = advice.larger.share.topology.sides[0]
    assert search.fits(advice.larger.share)
    for fewer in range(1, hosts):
        assert not search.fitting(config, find_topology(f"h100:{fewer}x4"))
    assert 0 < advice.longest.share.config.seq_len < 2**26


@pytest.mark.parametrize("impl", ["auto", "cudnn"])
def test_no_strategy_is_advised_that_its_kernel_refuses(impl):
    """On 128 GPUs all_gather in the zigzag layout needs 511 calls of cuDNN, which is refused when it is traced."""
    config = load_config(GPU)
    attention = dataclasses.replace(config.attention, impl=impl)
    config = dataclasses.replace(config, mesh=MeshConfig(), attention=attention)
    names = {
        pod: {share.strategy.name for share in search.fitting(config, find_topology(pod)) if share.ring == ring}
        for pod, ring in (("h100:1x8", 8), ("h100:16x8", 128))
    }
    refused = names["h100:1x8"] - names["h100:16x8"]
    assert "all_gather" in refused


def test_an_approximation_is_not_answered_with_exact_attention():
    config = load_config("tiny")
    attention = dataclasses.replace(config.attention, strategy="sparse", stride=64)
    with pytest.raises(ConfigError, match="the planner does not know how long it takes"):
        make_plan(dataclasses.replace(config, attention=attention), find_topology("v5e:2x4"))


def test_a_thousand_chips_are_searched_in_five_seconds():
    config = dataclasses.replace(load_config(TPU), mesh=MeshConfig())
    start = time.process_time()
    advice = advise(config, find_topology("v5p:8x8x16"))
    assert time.process_time() - start < 5
    assert advice.fastest.share.devices == 1024
    assert advice.longest.share.config.seq_len > 10 * config.seq_len


def test_slices_grow_to_their_largest_and_then_there_are_more_of_them():
    names = list(advice_module._slices(find_topology("v5e:4x8")))
    assert names[:4] == ["v5e:8x8", "v5e:8x16", "v5e:16x16", "2xv5e:16x16"]
    assert names[-1] == "64xv5e:16x16"
    config = dataclasses.replace(load_config(TPU), mesh=MeshConfig(), seq_len=2**26)
    advice = advise(config, find_topology("v5e:16x16"))
    larger = advice.larger.share
    assert (advice.fastest, larger.topology.name) == (None, "4xv5e:16x16")
    assert search.fits(larger)
    assert not search.fitting(config, find_topology("2xv5e:16x16"))
