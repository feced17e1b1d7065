"""Bisecting for the longest context, with a compiler that takes no time."""

import types

import jax
import pytest

from ring_attention.checks import ConfigError
from ring_attention.hardware.topology import find_topology
from ring_attention.planning import compile_report
from ring_attention.planning.plan import make_plan
from ring_attention.training.flags import load_config


@pytest.fixture
def plan():
    return make_plan(load_config("configs/gpu_8xh100_7b.py"), find_topology("h100:1x8"))


def _pretend(monkeypatch, limit: int, refuse: bool = False):
    """A compiler whose programs take as much memory as they have tokens, scaled so that `limit` tokens just fit."""

    def memory(program):
        return types.SimpleNamespace(total=program, host=0)

    def compile_for(config, topology):
        needed = config.seq_len / limit * topology.chip.memory
        if refuse and config.seq_len > limit:
            raise compile_report.DoesNotFitError("too much", needed)
        return needed, 1.0

    monkeypatch.setattr(compile_report, "compile_for", compile_for)
    monkeypatch.setattr(compile_report.compiled, "memory_of", memory)


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.0, 1.4, 3.0])
@pytest.mark.parametrize("refuse", [False, True])
def test_longest_compiled_is_found_to_a_sixteenth(monkeypatch, plan, factor, refuse):
    limit = int(plan.longest * factor)
    _pretend(monkeypatch, limit, refuse)
    tried = []
    found = compile_report.longest_compiled(plan, lambda tokens, needed, fits: tried.append((tokens, fits)))
    assert 15 / 16 * limit - 4096 <= found <= limit
    assert all(fits == (tokens <= limit) for tokens, fits in tried)
    assert len(tried) == len(set(tried)) < 20


def test_longest_compiled_is_0_where_none_fits(monkeypatch, plan):
    _pretend(monkeypatch, 1)
    assert compile_report.longest_compiled(plan, lambda *_: None) == 0


def _refusing(monkeypatch, message: str):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compile_report, "compile_step", refuse)
    monkeypatch.setattr(compile_report, "pod_devices", lambda name: [])


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (23.72G) exceeds",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 23.72G of "
        "15.75G hbm. Exceeded hbm capacity by 7.97G.\n\nTotal hbm usage >= 24.72G:\n    reserved 1.00G\n    vmem 16M",
    ],
)
def test_compile_for_says_how_much_memory_was_missing(monkeypatch, plan, message):
    _refusing(monkeypatch, message)
    with pytest.raises(compile_report.DoesNotFitError, match=r"23\.7 GiB") as error:
        compile_report.compile_for(plan.share.config, plan.share.topology)
    assert error.value.needed == 23.72 * 2**30
    assert "\n" not in str(error.value)


VMEM = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem. Used 32.42M of "
    "16.00M vmem. Exceeded vmem capacity by 16.42M.\n\nProgram hbm requirement 4.00G",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for %splash. Scoped "
    "allocation with size 31.07M and limit 16.00M exceeded scoped vmem limit by 15.07M.",
)
SMEM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space smem. Used 2.00M of 1.00M smem."
SHARED = "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 270336, available: 232448"


@pytest.mark.parametrize(
    ("message", "name"), [*((message, "VMEM") for message in VMEM), (SMEM, "SMEM"), (SHARED, "shared memory")]
)
def test_compile_for_tells_vmem_from_hbm(monkeypatch, plan, message, name):
    _refusing(monkeypatch, message)
    for ask in (
        lambda: compile_report.compile_for(plan.share.config, plan.share.topology),
        lambda: compile_report.longest_compiled(plan, lambda *_: None),  # no shorter context would help
    ):
        with pytest.raises(ConfigError, match=rf"attention\.block_q=.* ran out of {name}, not .*give smaller") as error:
            ask()
        assert not isinstance(error.value, compile_report.DoesNotFitError)
        assert "\n" not in str(error.value)


def test_compile_for_passes_other_failures_on(monkeypatch, plan):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed")

    monkeypatch.setattr(compile_report, "compile_step", fail)
    monkeypatch.setattr(compile_report, "pod_devices", lambda name: [])
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        compile_report.compile_for(plan.share.config, plan.share.topology)
