"""simulate_devices in processes of its own, because a backend starts only once in each."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from ring_attention.parallel import simulate
from ring_attention.parallel.xla_flags import knows_flag

REPOSITORY = Path(__file__).parents[2]

SUM_OVER_DEVICES = """
import os
from ring_attention.parallel.simulate import simulate_devices
simulate_devices({count})
import jax
total = jax.pmap(lambda x: jax.lax.psum(x, "sp"), axis_name="sp")(jax.numpy.ones(jax.device_count()))
print(jax.device_count(), int(total[0]), os.environ["XLA_FLAGS"], sep="|")
"""

START_THEN_SIMULATE = """
import jax
from ring_attention.parallel.simulate import simulate_devices
jax.config.update("jax_num_cpu_devices", 2)
jax.devices()
simulate_devices({count})
print("accepted")
"""


def run(code, xla_flags=""):
    env = os.environ | {"XLA_FLAGS": xla_flags, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_simulate_devices_makes_devices_and_xla_takes_its_flags():
    done = run(SUM_OVER_DEVICES.format(count=3))
    assert done.returncode == 0, done.stderr
    devices, total, flags = done.stdout.strip().split("|")
    assert (devices, total) == ("3", "3")
    assert "--xla_cpu_collective_call_terminate_timeout_seconds=7200" in flags


def test_simulate_devices_keeps_the_users_flags():
    own = "--xla_cpu_multi_thread_eigen=false --xla_cpu_collective_call_terminate_timeout_seconds=99"
    done = run(SUM_OVER_DEVICES.format(count=2), own)
    assert done.returncode == 0, done.stderr
    flags = done.stdout.strip().split("|")[2]
    assert flags.startswith(own + " ")
    assert flags.count("terminate_timeout") == 1


def test_knows_flag_tells_known_flags_from_others():
    assert knows_flag("xla_cpu_collective_call_terminate_timeout_seconds")
    assert knows_flag("xla_backend_optimization_level")
    assert not knows_flag("xla_cpu_no_such_flag")
    assert not knows_flag("xla_backend_optimization")  # a part of a flag's name


def test_simulate_devices_leaves_out_a_flag_that_jaxlib_dropped(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(simulate, "_PATIENCE", {"xla_dropped": 1, "xla_kept": 2})
    monkeypatch.setattr(simulate, "knows_flag", lambda name: name == "xla_kept")
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # as in a process without a backend
    simulate.simulate_devices(2)
    assert os.environ["XLA_FLAGS"] == "--xla_kept=2"


def test_unknown_flag_ends_a_process_of_xla():
    assert run(SUM_OVER_DEVICES.format(count=2), "--xla_cpu_no_such_flag=1").returncode != 0


def test_simulate_devices_accepts_a_backend_with_enough():
    done = run(START_THEN_SIMULATE.format(count=2))
    assert done.stdout.strip() == "accepted", done.stderr


def test_simulate_devices_refuses_a_backend_with_too_few():
    done = run(START_THEN_SIMULATE.format(count=4))
    assert "RuntimeError: JAX has started with 2 CPU devices, need 4; call simulate_devices(4) before" in done.stderr
