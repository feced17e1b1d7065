import signal

import pytest

SECONDS = 10


@pytest.fixture
def in_time():
    """Fails where a hang would be."""

    def late(*_):
        pytest.fail(f"no answer after {SECONDS} s")  # no OSError, which a reader would take for the file's

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
