import os
import signal
import types

import pytest

from ring_attention.training.fault_tolerance import preemption as preemption_module
from ring_attention.training.fault_tolerance.errors import INTERRUPTED, Interrupted, Preempted
from ring_attention.training.fault_tolerance.preemption import Preemption


@pytest.fixture(autouse=True)
def handled():
    """Signals that reach this process outside of a run's steps; they would end it."""
    arrived = []
    before = {n: signal.signal(n, lambda n, frame: arrived.append(n)) for n in (signal.SIGTERM, signal.SIGINT)}
    yield arrived
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def left(monkeypatch):
    """(status, line) of each time that this process would have ended at once."""
    left = []
    monkeypatch.setattr(preemption_module, "exit_with_line", lambda *words: left.append(words))
    monkeypatch.setattr(preemption_module, "SAME_PRESS", 0.0)
    return left


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_preemption_notices_a_signal_after_the_step(handled):
    with Preemption() as preemption:
        assert not preemption.reached()
        terminate()
        assert preemption.reached()
        assert preemption.reached()
    assert handled == []


def test_preemption_leaves_signals_alone_outside_the_steps(handled):
    with Preemption() as preemption:
        terminate()
        assert handled == [signal.SIGTERM]
        assert not preemption.reached()
    terminate()
    assert handled == [signal.SIGTERM] * 2


def test_preemption_gives_signals_back_after_an_error(handled):

    def fail():
        with Preemption() as preemption:
            preemption.reached()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    terminate()
    assert handled == [signal.SIGTERM]


def test_preemption_asks_jax_once_a_step_for_many_processes(handled, monkeypatch):
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
        assert handled == [signal.SIGTERM]
        press_ctrl_c()
        assert handled == [signal.SIGTERM] * 2, "the service knows of SIGTERM alone"
        with pytest.raises(Interrupted):
            preemption.stop(3, 9, "runs/a")
    assert asked == [1, 2, 3]


def test_preemption_by_ctrl_c_stops_like_sigterm_and_says_so(handled):
    with Preemption() as preemption:
        assert not preemption.reached()
        press_ctrl_c()
        assert preemption.reached()
        with pytest.raises(Interrupted, match=r"^Stopped by Ctrl-C after step 3 of 9; it is in runs/a, and the same"):
            preemption.stop(3, 9, "runs/a")
    assert handled == []
    press_ctrl_c()
    assert handled == [signal.SIGINT]


def test_preemption_by_sigterm_says_so():
    with Preemption() as preemption:
        preemption.reached()
        terminate()
        with pytest.raises(Preempted, match="^Stopped by SIGTERM after") as stopped:
            preemption.stop(3, 9, "runs/a")
        assert not isinstance(stopped.value, Interrupted)


@pytest.mark.parametrize("first", [terminate, press_ctrl_c])
def test_preemption_ends_at_once_on_a_second_ctrl_c(left, first):
    with Preemption() as preemption:
        preemption.reached()
        first()
        assert left == []
        press_ctrl_c()
        ((status, line),) = left
    assert status == INTERRUPTED
    assert "before the checkpoint was written" in line


def test_preemption_takes_a_doubled_ctrl_c_for_one(left, monkeypatch):
    monkeypatch.setattr(preemption_module, "SAME_PRESS", 60.0)
    with Preemption() as preemption:
        preemption.reached()
        press_ctrl_c()
        press_ctrl_c()
        terminate()
    assert left == []


def test_preemption_leaves_ignored_signals_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Preemption() as preemption:
        preemption.reached()
        press_ctrl_c()
        assert not preemption.reached()
