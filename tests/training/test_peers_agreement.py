"""Processes that were started otherwise say so before the first step; here they are pretended, with a store."""

import dataclasses
import json
import types

import jax
import pytest

from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.models.config import ModelConfig
from ring_attention.training.config import OptimizerConfig, TrainConfig
from ring_attention.training.config_values import field_kinds
from ring_attention.training.fault_tolerance import peers
from ring_attention.training.fault_tolerance.peers import program_fields, require_agreement

MODEL = ModelConfig(vocab_size=264, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64)
CONFIG = TrainConfig(name="tiny", model=MODEL, seq_len=512, num_steps=200)
ALIKE = "start all alike"


class Store:
    """The store of the coordination service, in which a key appears at the third time of asking."""

    def __init__(self):
        self.told, self.asked = {}, 0

    def key_value_set(self, key, value):
        assert key not in self.told, "a topic is compared once"
        self.told[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        self.asked += 1
        if self.asked < 3:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: not yet")
        return self.told[key]


@pytest.fixture
def speak_as(monkeypatch):
    """Become a process of three."""
    runtime = types.SimpleNamespace(client=Store(), num_processes=3, process_id=0)
    monkeypatch.setattr(peers, "distributed", types.SimpleNamespace(global_state=runtime))
    return lambda number: setattr(runtime, "process_id", number)


def refusal(speak_as, first, other):
    require_agreement("program", first, ALIKE)
    speak_as(2)
    with pytest.raises(ConfigError) as error:
        require_agreement("program", other, ALIKE)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_agreement_lets_processes_started_alike_go_on(speak_as):
    fields = program_fields(CONFIG)
    for number in range(3):
        speak_as(number)
        require_agreement("program", fields, ALIKE)


DIFFERENT = {
    "seed": dict(seed=1),
    "optimizer.learning_rate": dict(optimizer=OptimizerConfig(learning_rate=0.25)),
    "data.paths": dict(data=DataConfig(paths="other/*.txt")),
    "run_dir": dict(run_dir="elsewhere"),
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_agreement_names_a_field_with_both_values(speak_as, field):
    other = dataclasses.replace(CONFIG, **DIFFERENT[field])
    message = refusal(speak_as, program_fields(CONFIG), program_fields(other))
    got, need = program_fields(other)[field], program_fields(CONFIG)[field]
    assert message == f"{field}={got!r}: so in process 2, and in process 0 it is {need!r}; {ALIKE}"


def test_agreement_names_some_of_many_fields(speak_as):
    other = dataclasses.replace(CONFIG, seed=1, batch_size=2, num_steps=300)
    message = refusal(speak_as, program_fields(CONFIG), program_fields(other))
    assert all(field in message for field in ("seed", "batch_size", "num_steps"))


@pytest.mark.parametrize("package", ["python", *peers.PACKAGES])
def test_agreement_names_a_version_that_differs(speak_as, package):
    fields = program_fields(CONFIG)
    message = refusal(speak_as, fields, fields | {f"version of {package}": "0.0.1"})
    assert message.startswith(f"version of {package}='0.0.1': so in process 2, and in process 0 it is '")


def test_program_fields_hold_config_source_and_settings():
    fields = program_fields(CONFIG)
    assert field_kinds().keys() < fields.keys()
    assert json.loads(json.dumps(fields)) == fields
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        assert program_fields(CONFIG)["jax_default_matmul_precision"] != fields["jax_default_matmul_precision"]
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_source_digest_changes_with_a_byte(monkeypatch, tmp_path):
    (tmp_path / "training" / "fault_tolerance").mkdir(parents=True)
    file = tmp_path / "training" / "fault_tolerance" / "peers.py"
    monkeypatch.setattr(peers, "__file__", str(file))
    file.write_text("a = 1\n")
    before = peers.source_digest()
    assert before == peers.source_digest()
    file.write_text("a = 2\n")
    assert before != peers.source_digest()


def test_agreement_of_one_process_asks_nobody(monkeypatch):
    alone = types.SimpleNamespace(client=None, num_processes=None, process_id=0)
    monkeypatch.setattr(peers, "distributed", types.SimpleNamespace(global_state=alone))
    require_agreement("program", program_fields(CONFIG), ALIKE)


def test_agreement_hides_no_error_but_the_stores_timeout(speak_as, monkeypatch):
    def fail(key, milliseconds):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    monkeypatch.setattr(peers.distributed.global_state.client, "blocking_key_value_get", fail, raising=False)
    speak_as(1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
        require_agreement("program", {}, ALIKE)
