import os
import signal
import types

import pytest

from ring_attention.training.survival import preemption as preemption_module
from ring_attention.training.survival.preemption import Preemption


@pytest.fixture(autouse=True)
def handled():
    """Signals that reach this process outside of a run's steps; they would end it."""
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    yield arrived
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_among_the_steps_is_noticed_after_the_step_and_stays(handled):
    with Preemption() as preemption:
        assert not preemption.reached()
        terminate()
        assert preemption.reached()
        assert preemption.reached()
    assert handled == []


def test_before_the_first_step_and_after_the_last_a_signal_does_what_it_always_does(handled):
    with Preemption() as preemption:
        terminate()
        assert handled == [signal.SIGTERM]
        assert not preemption.reached()
    terminate()
    assert handled == [signal.SIGTERM] * 2


def test_an_error_in_a_step_gives_the_signal_back_too(handled):

    def fail():
        with Preemption() as preemption:
            preemption.reached()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    terminate()
    assert handled == [signal.SIGTERM]


def test_several_processes_ask_jax_once_a_step_counting_and_leave_the_signal_to_it(handled, monkeypatch):
    asked = []

    def reached_preemption_sync_point(step):
        asked.append(step)
        return step == 3

    service = types.SimpleNamespace(global_state=types.SimpleNamespace(preemption_sync_manager=object()))
    monkeypatch.setattr(preemption_module, "distributed", service)
    monkeypatch.setattr(
        preemption_module.multihost_utils, "reached_preemption_sync_point", reached_preemption_sync_point
    )
    with Preemption() as preemption:
        assert [preemption.reached() for _ in range(3)] == [False, False, True]
        terminate()
    assert asked == [1, 2, 3]
    assert handled == [signal.SIGTERM]
