"""Processes of a run meet, or say in a line why they cannot; here they are threads, and JAX has no part in it."""

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ring_attention.checks import ConfigError
from ring_attention.training import rendezvous
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.processes import ProcessFlags
from ring_attention.training.rendezvous import meet


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 0.4)
    monkeypatch.setattr(rendezvous, "BIND_SECONDS", 0.4)


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def meet_all(address, numbers, count, seconds=5.0, counts=None):
    """What ends each of the processes `numbers`: None, or its error; each comes a moment after the one before."""

    def one(place):
        time.sleep(0.1 * place)
        try:
            who = dict(num_processes=(counts or {}).get(numbers[place], count), process_id=numbers[place])
            return meet(address, **who, seconds=seconds)
        except (ConfigError, RunError) as error:
            return error

    with ThreadPoolExecutor(len(numbers)) as pool:
        ended = list(pool.map(one, range(len(numbers))))
    assert "\n" not in "".join(map(str, ended))
    return ended


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [3, 1, 0, 2]], ids=["in order", "the first comes third"])
def test_meet_lets_all_go_on_and_leaves_the_port_free(address, numbers):
    assert meet_all(address, numbers, 4) == [None] * 4
    host, _, port = address.partition(":")
    socket.create_server((host, int(port))).close()


@pytest.mark.parametrize("numbers", [[0, 1, 1, 2], [0, 2, 0, 1], [1, 0, 1]])
def test_meet_tells_all_of_two_processes_with_one_number(address, numbers):
    twice = next(number for number in numbers if numbers.count(number) == 2)
    ended = meet_all(address, numbers, len(set(numbers)) + 1, seconds=1.0)
    words = f"--process_id={twice}: two processes have this number; give each its own"
    said = [error for error in ended if str(error) == words]
    assert len(said) >= 2 if twice == 0 else len(said) >= 3, "but those who came after it was over"
    assert all(isinstance(error, ConfigError) for error in said)
    assert None not in ended


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there they can tell without process 0")
def test_meet_finds_doubled_numbers_without_process_0(address):
    began = time.monotonic()
    ended = meet_all(address, [1, 1], 2, seconds=20)
    assert time.monotonic() - began < 5
    assert [str(error) for error in ended] == ["--process_id=1: two processes have this number; give each its own"] * 2


def test_meet_tells_all_of_a_process_that_counts_otherwise(address):
    ended = meet_all(address, [0, 1, 2], 3, counts={1: 2}, seconds=1.0)
    assert "--num_processes=2: process 1 was told so, and process 0 3; give all processes the same number" in str(
        ended[0]
    )
    assert str(ended[1]) == str(ended[0])
    assert None not in ended


def test_meet_names_those_who_never_come(address):
    began = time.monotonic()
    first, third = meet_all(address, [0, 2], 5, seconds=0.8)
    assert time.monotonic() - began < 5
    assert isinstance(first, RunError)
    assert str(first).startswith("3 of 5 processes have not come within 0.8 s: number 1, 3, 4; start all of them with")
    assert str(third) == str(first)


def test_meet_says_that_process_0_never_came(address):
    (error,) = meet_all(address, [1], 2, seconds=0.5)
    assert isinstance(error, RunError)
    assert f"{address}: process 0 has not been there within 0.5 s; start it, with --process_id=0" in str(error)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"heard": 7}\n', b"[]\n"])
def test_meet_names_a_port_that_another_program_has(address, answer):
    host, _, port = address.partition(":")
    over = threading.Event()

    def serve():
        while not over.is_set():
            try:
                connection = server.accept()[0]
            except TimeoutError:
                continue
            connection.sendall(answer)
            held.append(connection)

    held = []
    with socket.create_server((host, int(port))) as server:
        server.settimeout(0.1)
        thread = threading.Thread(target=serve)
        thread.start()
        first, second = meet_all(address, [0, 1], 2, seconds=0.5)
        over.set()
        thread.join()
        for connection in held:
            connection.close()
    assert isinstance(first, ConfigError)
    assert isinstance(second, ConfigError)
    words = (
        f"--coordinator_address={address}: another program listens at that port of this machine; give a port that is"
    )
    assert words in str(first)
    assert "something listens there and does not answer as process 0 of this run" in str(second)


def test_meet_is_not_disturbed_by_strangers_at_the_port(address):
    host, _, port = address.partition(":")

    def knock():
        time.sleep(0.3)
        for words in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"{}\n",
            b'{"process_id": "x", "num_processes": null}\n',
            b"\xff\n",
        ):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(words)

    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(meet_all, address, [0, 1], 3, 4.0)
        pool.submit(knock).result()
        time.sleep(0.2)
        meet(address, num_processes=3, process_id=2, seconds=5)
        assert run.result() == [None, None]


def test_join_timeout_goes_with_the_other_flags():
    place = dict(coordinator_address="127.0.0.1:1", num_processes=2, process_id=0)
    assert ProcessFlags(**place, join_timeout=300).join_timeout == 300
    with pytest.raises(ConfigError, match="--join_timeout=0: must be positive"):
        ProcessFlags(**place, join_timeout=0)
    with pytest.raises(ConfigError, match="--join_timeout=3: --coordinator_address and --num_processes and"):
        ProcessFlags(join_timeout=3)
