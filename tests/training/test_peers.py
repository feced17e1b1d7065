"""Processes that tell each other how they are, through a store in memory in the place of JAX's."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import pytest

from ring_attention.checks import ConfigError
from ring_attention.training.fault_tolerance import peers as peers_module
from ring_attention.training.fault_tolerance.errors import Preempted, RunError
from ring_attention.training.fault_tolerance.peers import PATIENCE, Peers, _failed_together

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
"""A thread that would have ended the process ends itself here."""

LOST = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed")
ALIVE = "ring_attention/alive"


class Store:
    """The store of the coordination service, of which every process holds a client."""

    def __init__(self):
        self.told, self.away = {}, False

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self.told[key] = value

    def key_value_dir_get(self, folder):
        if self.away:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")
        return [item for item in self.told.items() if item[0].startswith(folder)]

    def tell(self, peer, words):
        self.told[f"{ALIVE}/{peer}"] = json.dumps(words)

    def heard_of(self, peer):
        return json.loads(self.told[f"{ALIVE}/{peer}"])


@pytest.fixture
def store(monkeypatch):
    """The store of three processes, this one 1, which beat quickly and are impatient."""
    store = Store()
    runtime = types.SimpleNamespace(client=store, num_processes=3, process_id=1, coordinator_address="127.0.0.1:1")
    monkeypatch.setattr(peers_module, "distributed", types.SimpleNamespace(global_state=runtime))
    monkeypatch.setattr(Peers, "_explain_aborts", lambda self, address: None)  # it would stay for other tests
    monkeypatch.setattr(peers_module, "BEAT", 0.01)
    monkeypatch.setattr(peers_module, "PATIENCE", 0.5)
    return store


@pytest.fixture
def ends(monkeypatch):
    """(status, line) of each time that this process would have ended; the thread that ends it does."""
    ends = []

    def end(status, line):
        ends.append((status, line))
        raise SystemExit

    monkeypatch.setattr(peers_module, "_end", end)
    return ends


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("peer", "words", "silent", "want"),
    [
        (2, {"beat": 7}, PATIENCE - 1, []),
        (2, {"beat": 7}, PATIENCE + 1, [(1, "process 2 of 3 has not been heard of for 21 s and counts as gone, so")]),
        (0, {"beat": -1}, PATIENCE + 1, [(1, "process 0 of 3 has not been heard of for 21 s and counts as gone, so")]),
        (2, {"finished": True}, PATIENCE + 1, []),
        (2, {"status": 2, "line": "train.py: error: seed=x"}, 0, [(2, "process 2 of 3 has stopped: seed=x")]),
        (1, {"beat": 7}, PATIENCE + 1, []),
        (1, {"status": 2, "line": "train.py: error: seed=x"}, 0, []),
    ],
)
def test_judge_ends_this_process_for_failed_or_silent_peers(store, monkeypatch, ends, peer, words, silent, want):
    monkeypatch.setattr(peers_module, "PATIENCE", PATIENCE)
    with contextlib.suppress(SystemExit):
        Peers()._judge(peer, words, silent)
    assert [(status, line[: len(start[1])]) for (status, line), start in zip(ends, want, strict=True)] == want


def test_watch_notices_the_peer_that_falls_silent(store, ends):
    beating = threading.Event()

    def beat():
        for number in range(10_000):
            if beating.wait(0.02):
                return
            store.tell(2, {"beat": number})

    store.tell(0, {"finished": True})
    other = threading.Thread(target=beat, daemon=True)
    other.start()
    with Peers():
        time.sleep(1.5)  # three times PATIENCE
        assert ends == []
        assert store.heard_of(1)["beat"] > 5
        beating.set()
        wait_until(lambda: ends)
    other.join()
    assert ends[0][0] == 1
    assert ends[0][1].startswith("process 2 of 3 has not been heard of for ")


def test_watch_counts_a_peer_never_heard_of_as_gone(store, ends):
    store.tell(0, {"finished": True})
    with Peers():
        wait_until(lambda: ends)
    assert ends[0][1].startswith("process 2 of 3 has not been heard of for ")


def test_watch_counts_nobody_as_gone_without_the_store(store, ends):
    store.tell(0, {"finished": True})
    store.tell(2, {"beat": 1})
    store.away = True
    with Peers():
        time.sleep(1)
    assert ends == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, {"finished": True}),
        (Preempted("stopped"), {"finished": True}),
        (ConfigError("seed=x"), {"status": 2, "line": "train.py: error: seed=x"}),
        (RunError("no room"), {"status": 1, "line": "train.py: error: no room"}),
    ],
    ids=["none", "preempted", "mistake", "failure"],
)
def test_peers_hear_how_a_process_ended(store, ends, error, words):
    store.tell(0, {"finished": True})
    store.tell(2, {"finished": True})
    with contextlib.suppress(type(error)), Peers():
        if error:
            raise error
    time.sleep(0.1)  # a thread that went on would overwrite it
    assert store.heard_of(1) == words


def test_peers_find_who_is_gone_after_a_failed_collective(store, ends):
    store.tell(0, {"finished": True})
    store.tell(2, {"beat": 1})
    with pytest.raises(jax.errors.JaxRuntimeError), Peers():
        raise LOST
    assert ends[0][1].startswith("process 2 of 3 has not been heard of for ")


def test_disconnect_is_not_missed_and_tells_no_more(store, ends, monkeypatch):
    left = []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: left.append(dict(store.told)))
    store.tell(0, {"finished": True})
    store.tell(2, {"finished": True})

    def fail_after_parting():
        with Peers() as peers:
            peers.disconnect()
            assert not peers._thread.is_alive()
            raise RunError("a picture could not be drawn")

    with pytest.raises(RunError):
        fail_after_parting()
    assert json.loads(left[0][f"{ALIVE}/1"]) == {"finished": True}
    assert len(left) == 1
    assert store.heard_of(1) == {"finished": True}


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "together"),
    [
        (None, False),
        (RunError("no room"), False),
        (KeyboardInterrupt(), False),
        (LOST, True),
        (raised_from(RunError("no checkpoint"), LOST), True),
        (raised_from(RunError("no checkpoint"), ValueError("Gloo timed out")), True),
        (ZeroDivisionError(), True),
    ],
    ids=repr,
)
def test_failed_together_tells_lost_peers_from_other_errors(error, together):
    assert _failed_together(error) == together


ABORT = """
import os, resource, sys, time
from ring_attention.training.fault_tolerance.peers import Peers
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
peers = Peers()
peers._me, peers._count = 1, 3
peers._seen = {0: ('{"beat": 3}', time.monotonic()), 1: ("", 0.0), 2: (sys.argv[2], time.monotonic() - 100)}
peers._explain_aborts("127.0.0.1:" + sys.argv[1])
os.abort()
"""


@pytest.mark.parametrize(
    ("listens", "words_of_2", "status", "line"),
    [
        (True, '{"beat": 3}', 1, "train.py: error: process 2 of 3 has not been heard of for 100 s"),
        (False, '{"finished": true}', 1, "train.py: error: process 0 of 3 has not been heard of for 0 s"),
        (True, '{"finished": true}', -signal.SIGABRT, ""),
    ],
    ids=["a peer is silent", "process 0 is gone", "another reason"],
)
def test_abort_for_want_of_a_peer_says_which(listens, words_of_2, status, line):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        if listens:
            probe.listen()
        command = [sys.executable, "-c", ABORT, str(probe.getsockname()[1]), words_of_2]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert line in done.stderr
    assert ("train.py: error" in done.stderr) == bool(line)
