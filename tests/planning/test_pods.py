import pytest
from jax.experimental import topologies

from ring_attention.checks import ConfigError
from ring_attention.planning.pods import pod_devices


@pytest.mark.parametrize(("topology", "extra"), [("v5e:16x16", "compile-tpu"), ("h100:1x8", "compile-gpu")])
def test_a_compiler_that_is_not_there_is_named_with_the_extra_that_brings_it(monkeypatch, topology, extra):
    def missing(**_):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError) as error:
        pod_devices(topology)
    assert f"topology='{topology}': " in str(error.value)
    assert f"pip install -e '.[{extra}]'" in str(error.value)
    assert "\n" not in str(error.value)
