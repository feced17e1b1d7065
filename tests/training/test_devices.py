"""keep_freed_memory in processes of their own, because it changes the whole process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = 16384

FAULTS = """
import resource
from ring_attention.training.devices import keep_freed_memory, return_freed_memory
{call}
def step():
    b"1" * ({pages} * resource.getpagesize())
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults_of_second_step(call):
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    code = FAULTS.format(call=call, pages=PAGES)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what Linux and glibc do")
def test_memory_that_was_freed_is_used_again_without_asking_the_system_for_its_pages():
    assert _faults_of_second_step("assert keep_freed_memory()") < PAGES / 10
    assert _faults_of_second_step("") >= PAGES  # the control: the system clears and maps each of them again
    assert _faults_of_second_step("assert keep_freed_memory() and return_freed_memory()") >= PAGES
