"""Whether the self-test of `impl="auto"` sees a kernel that is wrong, and how long its verdicts are kept."""

import dataclasses
import functools
import json
import types

import jax
import pytest
from ring_helpers import PLAIN, ring_mesh

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.attention.device_kind import DeviceKind
from ring_attention.attention.kernels import choose, self_test, splash, verdicts
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.testing import random_qkv

V5E, H100 = DeviceKind("tpu", "TPU v5 lite"), DeviceKind("gpu", "NVIDIA H100 80GB HBM3")
AMD, CPU, UNKNOWN = DeviceKind("gpu", "AMD Instinct MI300X"), DeviceKind("cpu", "cpu"), DeviceKind(None, None)


def _shifted(pair):
    """The block pair as if each query stood one place later: it sees one key too many."""
    queries = dataclasses.replace(pair.queries, positions=pair.queries.positions + 1)
    return dataclasses.replace(pair, queries=queries)


def _lse_shifted(*args):
    state = PLAIN.forward(*args)
    return SoftmaxState(state.acc * 1.05, state.max, state.sum * 1.05)


def _transposed(*args):
    dq, dk, dv = PLAIN.backward(*args)
    return dq, dv, dk


def _raise(*args):
    raise RuntimeError("the compiler said no")


FAULTS = {
    "scale": dict(forward=lambda q, *args: PLAIN.forward(1.1 * q, *args)),
    "dk and dv for each other": dict(backward=_transposed),
    "mask forward": dict(forward=lambda q, k, v, pair, *args: PLAIN.forward(q, k, v, _shifted(pair), *args)),
    "mask backward": dict(
        backward=lambda q, k, v, stats, pair, *args: PLAIN.backward(q, k, v, stats, _shifted(pair), *args)
    ),
    "lse": dict(forward=_lse_shifted),
    "dk of one shard": dict(
        backward=lambda q, k, v, stats, pair, *args: tuple(
            x * (1 if pair.diagonal or i != 1 else 0) for i, x in enumerate(PLAIN.backward(q, k, v, stats, pair, *args))
        )
    ),
    "it raises": dict(forward=_raise),
}


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """An empty cache folder, and no verdict in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(self_test.SWITCH, raising=False)
    self_test._failure_of.cache_clear()
    yield tmp_path / "ring_attention"
    self_test._failure_of.cache_clear()


@pytest.mark.parametrize("fault", FAULTS)
def test_self_test_sees_a_kernel_that_is_wrong(fault, own_cache):
    wrong = PLAIN._replace(name="wrong", **FAULTS[fault])
    failure = self_test.failure_of(wrong, CPU)
    assert (
        "its self-test raised RuntimeError: the compiler said no" in failure or "of the XLA tiles, at most" in failure
    )
    assert 'name impl="wrong" to take it anyway' in failure
    assert (fault == "it raises") == (not list(own_cache.glob("*.json"))), "what was raised may be gone the next time"


def test_self_test_passes_the_kernel_for_tpu_in_the_interpreter():
    forward, backward = (
        functools.partial(fn, interpret=True) for fn in (splash.SPLASH.forward, splash.SPLASH.backward)
    )
    kernel = splash.SPLASH._replace(forward=forward, backward=backward)
    assert self_test.difference(kernel, jax.devices()[0]) == ""


def _tested(monkeypatch, found=""):
    """Have the test find this; a list that grows whenever it is done."""
    done = []
    monkeypatch.setattr(self_test, "difference", lambda kernel, device: done.append(kernel.name) or found)
    return done


def _in_new_process(kernel=PLAIN):
    self_test._failure_of.cache_clear()
    return self_test.failure_of(kernel, CPU)


@pytest.mark.parametrize("found", ["", "dq 0.5 of its size from that of the XLA tiles"])
def test_verdict_is_kept_until_a_version_changes(found, own_cache, monkeypatch):
    done = _tested(monkeypatch, found)
    first = _in_new_process()
    assert bool(first) == bool(found)
    assert _in_new_process() == first
    assert len(done) == 1
    monkeypatch.setattr(verdicts, "_version", lambda package: "another")
    _in_new_process()
    assert len(done) == 2
    assert _in_new_process(PLAIN._replace(name="another")) is None or found
    assert len(done) == 3
    for file in own_cache.iterdir():
        file.write_text("half a verd")
    _in_new_process()
    assert len(done) == 4
    kept = [json.loads(file.read_text()) for file in own_cache.iterdir() if "half" not in file.read_text()]
    assert [x["difference"] for x in kept] == [found]


@pytest.mark.usefixtures("own_cache")
def test_a_folder_that_nobody_can_write_is_no_failure(monkeypatch, tmp_path):
    tmp_path.joinpath("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = _tested(monkeypatch)
    assert _in_new_process() is None
    assert _in_new_process() is None
    assert len(done) == 2


@pytest.mark.usefixtures("own_cache")
def test_the_test_is_left_out_where_it_is_switched_off_or_there_is_no_device(monkeypatch):
    done = _tested(monkeypatch, "all wrong")
    assert self_test.failure_of(PLAIN, V5E) is None
    monkeypatch.setenv(self_test.SWITCH, "off")
    assert self_test.failure_of(PLAIN, CPU) is None
    assert done == []
    monkeypatch.setenv(self_test.SWITCH, "no")
    with pytest.raises(ValueError, match="RING_ATTENTION_SELF_TEST='no'"):
        self_test.failure_of(PLAIN, CPU)


@pytest.mark.usefixtures("own_cache")
def test_a_ring_that_is_traced_has_its_kernel_tested_and_leaves_a_wrong_one(monkeypatch, caplog):
    """On a platform whose fused kernel is a stand-in: the test runs on a device while jit and shard_map are traced."""
    monkeypatch.setitem(choose.FUSED, "cpu", ("fused",))
    q, k, v, *_ = random_qkv(0, 1, 64, 2, 1, 8)
    taken = []

    def warnings_of(**functions):
        def forward(*args):
            taken.append(args[0].shape[2])
            return functions.get("forward", PLAIN.forward)(*args)

        monkeypatch.setitem(kernels.KERNELS, "fused", PLAIN._replace(name="fused", forward=forward))
        choose.log_once.cache_clear()
        self_test._failure_of.cache_clear()
        verdicts.path_of(verdicts.key_of("fused", jax.devices()[0])).unlink(missing_ok=True)
        caplog.clear()
        taken.clear()
        jax.make_jaxpr(jax.jit(functools.partial(ra.ring_attention, mesh=ring_mesh(2), layout="zigzag")))(q, k, v)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert warnings_of() == []
    assert set(taken) == {self_test.t, 32}, "tested, then taken"
    (warning,) = warnings_of(**FAULTS["lse"])
    assert "its self-test found lse 0." in warning
    assert set(taken) == {self_test.t}, "tested, and left"


def test_processes_tell_each_other_what_their_self_tests_found(monkeypatch):
    monkeypatch.setattr(self_test, "failure_of", lambda kernel, kind: "wrong" if kind == H100 else None)
    assert choose.self_tests(H100) == {"self-test of cudnn": "failed", "self-test of tokamax": "failed"}
    assert choose.self_tests(V5E) == {"self-test of splash": "passed"}
    assert choose.self_tests(CPU) == choose.self_tests(AMD) == choose.self_tests(UNKNOWN) == {}
    monkeypatch.setattr(self_test, "failure_of", lambda kernel, kind: None)
    assert choose.self_tests(H100) == {"self-test of cudnn": "passed"}, "the next one would not be taken"

    def only_tokamax(kernel):
        if kernel.name == "cudnn":
            raise ValueError("no softcap")

    asked = {"self-test of cudnn": "not asked", "self-test of tokamax": "passed"}
    assert choose.self_tests(H100, only_tokamax) == asked


def test_a_verdict_is_of_the_device_and_its_driver():
    keys = [
        verdicts.key_of("splash", types.SimpleNamespace(device_kind=kind, client=types.SimpleNamespace(**client)))
        for kind, client in (("a", {}), ("b", {}), ("a", dict(platform_version="2")))
    ]
    assert len({verdicts.path_of(key) for key in keys}) == 3
