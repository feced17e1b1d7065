import importlib.util
import os
import subprocess
import sys
import types

import pytest
from jax.experimental import topologies

from ring_attention.checks import ConfigError
from ring_attention.hardware.pods import pod_devices
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.wires import hops_of

needs_tpu_compiler = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra compile-tpu")
needs_gpu_compiler = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="needs the extra compile-gpu",
)


def _install(monkeypatch, *versions):
    """JAX's plugins for these versions of CUDA, and no other, can be imported."""
    monkeypatch.setitem(sys.modules, "jax_plugins", types.ModuleType("jax_plugins"))
    for version in (12, 13):
        name = f"jax_plugins.xla_cuda{version}"
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if version in versions else None)


def _refusal(topology):
    with pytest.raises(ConfigError) as error:
        pod_devices(topology)
    assert f"topology='{topology}': " in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("topology", "extra"), [("v5e:16x16", "compile-tpu"), ("h100:1x8", "compile-gpu"), ("a100:4x8", "compile-gpu")]
)
def test_pod_devices_names_the_extra_of_a_missing_compiler(monkeypatch, topology, extra):
    def missing(**_):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    assert f"pip install -e '.[{extra}]'" in _refusal(topology)


@pytest.mark.parametrize(
    ("topology", "remedy"),
    [
        ("v9:4x4", "choose one of v3, v4, v5e"),
        ("banana", "choose one of v3, v4, v5e"),
        ("", "choose one of v3, v4, v5e"),
        ("v5e", "write it like v5e:16x16"),
        ("v5e:4x4x4", "write it like v5e:16x16"),
        ("v3:8x8x8", "write it like v3:16x16"),
        ("v4:4x4", "write it like v4:8x8x8"),
        ("v5p:eight", "write it like v5p:8x8x8"),
        ("v6e:0x4", "write it like v6e:16x16"),
        ("a100:8", "write it like a100:4x8"),
        ("h100:1x8x2", "write it like h100:4x8"),
        ("mi300x:1x8", "choose one of a100, a100-40, h100, h200, b200, gb200, b300"),
    ],
)
def test_pod_devices_says_how_to_write_a_topology(topology, remedy):
    message = _refusal(topology)
    assert remedy in message
    assert "install" not in message


def test_pod_devices_tells_unknown_slices_from_no_compiler(monkeypatch):
    def unknown(**_):
        raise RuntimeError("INVALID_ARGUMENT: not divisible by the hosts\nand a long story")

    monkeypatch.setattr(topologies, "get_topology_desc", unknown)
    message = _refusal("v5e:3x5")
    assert "install" not in message
    assert "choose a slice that is sold" in message


def test_pod_devices_says_how_to_compile_without_a_gpu(monkeypatch):
    def none_found(**_):
        raise NotImplementedError("topology not implemented for cuda")

    _install(monkeypatch, 12)
    monkeypatch.setattr(topologies, "get_topology_desc", none_found)
    message = _refusal("h100:1x8")
    assert "JAX_PLATFORMS=cpu" in message
    assert "install" not in message


@pytest.mark.parametrize(("installed", "loaded"), [((12,), 12), ((13,), 13), ((12, 13), 13)])
def test_pod_devices_loads_the_newest_compiler_for_cuda_that_is_installed(monkeypatch, installed, loaded):
    _install(monkeypatch, *installed)
    load, found = importlib.import_module, []
    monkeypatch.setattr(importlib, "import_module", lambda name: found.append(load(name)))
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: types.SimpleNamespace(devices=[]))
    assert pod_devices("h100:1x8") == []
    assert [module.__name__ for module in found] == [f"jax_plugins.xla_cuda{loaded}"]


def test_pod_devices_names_the_extra_where_no_compiler_for_cuda_is_installed(monkeypatch):
    _install(monkeypatch)
    message = _refusal("h100:1x8")
    assert "xla_cuda13" in message
    assert "pip install -e '.[compile-gpu]'" in message


@needs_gpu_compiler
@pytest.mark.parametrize(("topology", "kind"), [("a100:4x8", "A100-SXM4-80GB"), ("b300:4x8", "B300 SXM6 AC")])
def test_pod_devices_gives_gpus_of_the_chip(topology, kind):
    code = f"""from ring_attention.hardware.pods import pod_devices
print([device.device_kind for device in pod_devices({topology!r})])"""
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str([f"NVIDIA {kind}"] * 32)


@pytest.mark.pod
@needs_tpu_compiler
@pytest.mark.parametrize(
    ("topology", "devices", "kind"),
    [("v3:16x16", 512, "TPU v3"), ("v4:8x8x8", 512, "TPU v4"), ("tpu7x:4x4x4", 128, "TPU7x")],
)
def test_pod_devices_of_v3_and_tpu7x_are_cores_and_of_v4_chips(topology, devices, kind):
    found = pod_devices(topology)
    assert len(found) == devices
    assert found[0].device_kind == kind


@pytest.mark.pod
@needs_tpu_compiler
def test_pod_devices_passes_on_a_compilers_refusal():
    assert "choose a slice that is sold" in _refusal("v5e:3x5")


@pytest.mark.pod
@needs_tpu_compiler
def test_rings_of_two_slices_stay_in_one_where_they_can():
    devices = pod_devices("2xv5e:2x4")
    assert [device.slice_index for device in devices] == [0] * 8 + [1] * 8
    assert hops_of(make_mesh(dp=2, sp=8, devices=devices)) == (1, 0)
    assert hops_of(make_mesh(sp=16, devices=devices)).crossings == 2
