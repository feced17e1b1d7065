import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_folders import LLAMA, write_folder

TESTS = Path(__file__).parent.parent
LARGER = LLAMA | dict(vocab_size=16_384, hidden_size=512, intermediate_size=1408, num_hidden_layers=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("folders")
    write_folder(path / "small", LLAMA)
    write_folder(path / "larger", LARGER, shards=2)
    return path


def _beyond(folders, how):
    """Bytes of host memory beyond the arrays, and of the largest tensor."""
    run = subprocess.run(
        [sys.executable, str(TESTS / "hf_memory.py"), str(folders / "small"), str(folders / "larger"), how],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))},
    )
    found = json.loads(run.stdout)
    assert found["arrays"] > 7 * found["largest"]
    return found["beyond"], found["largest"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how much memory a process took")
def test_loading_takes_no_more_than_a_tensor_beyond_the_arrays(folders):
    beyond, largest = _beyond(folders, "streamed")
    assert beyond < largest
    beyond, largest = _beyond(folders, "at_once")
    assert beyond > 7 * largest  # the control: a loader that reads everything first
