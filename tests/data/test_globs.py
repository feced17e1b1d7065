"""Globs find what `glob` finds, in trees of any links, and open nothing."""

import glob
import os

import pytest

from ring_attention.checks import ConfigError
from ring_attention.data.globs import matching_files

FILES = (
    "a.txt",
    "b.md",
    ".hidden.txt",
    "x/a.txt",
    "x/y/a.txt",
    "x/y/z/b.txt",
    ".git/a.txt",
    "x-y/[1].txt",
    "x/y/é.txt",
)
PATTERNS = ("*", "*.txt", "**", "**/*", "**/*.txt", "**/y/*", "**/y/**/*.txt", "x/**", "*/a.txt", ".*", "x*/?.txt")
MORE_PATTERNS = (
    "**/.*",
    "x/y/[ab].txt",
    "**/[!a].txt",
    "x-y/[[]1].txt",
    "./x//a.txt",
    "x/../a.txt",
    "x/./**/z/*",
    "none/**",
)


@pytest.fixture
def tree(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS + MORE_PATTERNS)
def test_matching_files_agree_with_glob_without_links(tree, pattern, monkeypatch):
    expected = sorted(os.path.realpath(p) for p in glob.glob(f"{tree}/{pattern}", recursive=True) if os.path.isfile(p))
    monkeypatch.chdir(tree)
    for paths in (f"{tree}/{pattern}", pattern):
        if not expected:
            with pytest.raises(ConfigError, match="no file matches"):
                matching_files(paths)
            continue
        assert sorted(os.path.realpath(path) for _, path in matching_files(paths)) == expected


@pytest.mark.parametrize("pattern", ["**/*.txt", "**", "**/x/**/*.txt", "**/**/**/*.txt"])
def test_matching_files_end_loops_and_count_no_file_twice(tree, pattern, in_time):
    before = sorted(os.path.realpath(path) for _, path in matching_files(f"{tree}/{pattern}"))
    for number in range(12):  # each doubles the paths of a walk that follows them, to a depth of 40
        (tree / "x" / f"up{number}").symlink_to("..")
        (tree / f"zz{number}").symlink_to("x")
    (tree / "self").symlink_to("self")
    (tree / "broken").symlink_to("nothing")
    found = sorted(os.path.realpath(path) for _, path in matching_files(f"{tree}/{pattern}"))
    assert set(before) <= set(found)
    assert len(set(found)) == len(found) <= len(FILES)


def test_matching_files_follow_links_to_elsewhere(tree, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    (blobs / "0123").write_text("text")
    (blobs / "more").mkdir()
    (blobs / "more" / "m.txt").write_text("text")
    (tree / "x" / "linked.txt").symlink_to(blobs / "0123")
    (tree / "folder").symlink_to(blobs / "more")
    names = [name for name, _ in matching_files(f"{tree}/**/*.txt")]
    assert {"x/linked.txt", "folder/m.txt"} < set(names)


def test_matching_files_never_open_pipes_and_devices(tree, in_time):
    os.mkfifo(tree / "pipe.txt")
    (tree / "zero.txt").symlink_to("/dev/zero")
    (tree / "folder.txt").mkdir()
    assert [name for name, _ in matching_files(f"{tree}/*.txt")] == ["a.txt"]
    for path in (tree / "pipe.txt", "/dev/zero"):
        with pytest.raises(ConfigError, match=r"no file matches .*; it is a pipe or a device, copy what comes from it"):
            matching_files(str(path))
