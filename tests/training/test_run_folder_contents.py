"""A run whose documents or tokenizer changed under the same names does not go on in silence."""

import dataclasses
import json

import pytest

from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.training.batches import Corpus, digests
from ring_attention.training.run_folder import DIGESTS, RunFolder, require_same_contents


class Documents:
    """A side of the split, as far as it is asked."""

    def __init__(self, digest):
        self._digest = digest

    def __len__(self):
        return 1200

    def digest(self):
        return self._digest


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0"}')
    return DataConfig(tokenizer=str(file))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


CORPUS = Corpus(Documents("aa"), Documents("bb"), None, None)
CHANGES = {
    "data.paths (training documents)": dict(train=Documents("cc")),
    "data.paths (held-out documents)": dict(held_out=Documents("cc")),
    "data.tokenizer": {},
}


def refusal(folder, now):
    with pytest.raises(ConfigError) as error:
        require_same_contents(folder, now, has_begun=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_contents_unchanged_go_on(folder, config):
    for has_begun in (False, True, True):
        require_same_contents(folder, digests(config, CORPUS), has_begun=has_begun)
    assert [file.name for file in folder.path.iterdir()] == [DIGESTS]


@pytest.mark.parametrize("field", CHANGES)
def test_contents_changed_are_named_with_a_way_to_go_on(folder, config, tmp_path, field):
    require_same_contents(folder, digests(config, CORPUS), has_begun=False)
    if field == "data.tokenizer":
        (tmp_path / "tokenizer.json").write_text('{"version": "1.1"}')
    changed = digests(config, dataclasses.replace(CORPUS, **CHANGES[field]))
    message = refusal(folder, changed)
    assert message.startswith(f"{field}: its contents are others (")
    assert f"the new ones by removing {folder.path}/{DIGESTS}" in message
    (folder.path / DIGESTS).unlink()
    require_same_contents(folder, changed, has_begun=True)
    assert json.loads((folder.path / DIGESTS).read_text()) == changed


def test_contents_of_a_new_run_are_taken_as_they_are(folder, config):
    require_same_contents(folder, {"data.tokenizer": "older"}, has_begun=False)
    require_same_contents(folder, digests(config, CORPUS), has_begun=False)
    require_same_contents(folder, digests(config, CORPUS), has_begun=True)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_contents_file_that_is_damaged_is_refused_in_one_line(folder, config, content):
    (folder.path / DIGESTS).write_text(content)
    assert "is not an object in JSON; remove it" in refusal(folder, digests(config, CORPUS))
