"""A disk without room: a small tmpfs or, where none may be mounted, a limit on the size of files."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from .scene import Scene
from .verdicts import CORRUPTED


def disk_full(scene: Scene) -> None:
    """A copy of the run goes on where there is less room than a checkpoint takes, then where there is enough."""
    chain, outcome = scene.chain, scene.outcome
    chain.until(chain.folder.newest, "write a checkpoint")
    scene.train_a_while(0, 5)
    with scene.frozen(), small_disk(scene.spare) as disk:
        copy = chain.copy(disk.seen / "run")
        newest = copy.newest()
        for path in copy.checkpoints_path.iterdir():  # what a start may remove would make room
            if path.name != str(newest):
                shutil.rmtree(path)
        disk.fill(copy.checkpoints_path / str(newest), scene.rng.uniform(0.1, 0.9))
        with scene.started(disk.own / "run", prefix=disk.prefix) as life:
            codes = life.codes("stop for want of room", chain.deadline)
        scene.require_exit(life, codes, 1)
        scene.require_one_line(life.stderr)
        kept = f"checkpoint {newest} was there before, {copy.newest()} is the newest after"
        outcome.require(copy.newest() >= newest, CORRUPTED, kept)
        outcome.step = copy.steps_done()
        outcome.bound = 2 * chain.trainer.checkpoint_every  # one beyond the checkpoint that did not fit
        outcome.notes.append(f"{disk.kind}: ended with {codes[0]} after step {outcome.step}")
        disk.free()
        with scene.started(disk.own / "run", prefix=disk.prefix) as life:
            scene.require_going_on(life, copy, outcome.step)


class SmallDisk(Protocol):
    """A folder in which little can be written.

    Attributes:
      kind: what makes it small.
      seen: its path for the harness.
      own: its path for a command that comes after `prefix`.
      prefix: what such a command comes after.
    """

    kind: str
    seen: Path
    own: Path
    prefix: Sequence[str]

    def fill(self, checkpoint: Path, share: float) -> None:
        """Leave less room than another checkpoint like this one takes, in proportion to `share` of it."""

    def free(self) -> None:
        """Make room."""


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[SmallDisk]:
    """Yield a disk at `path`, a new folder, that is small as far as this machine permits it."""
    path.mkdir(parents=True)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", Tmpfs.MOUNT, "sh", str(path)]
    try:
        keeper = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        yield SizeLimit(path)
        return
    with keeper:
        try:
            mounted = keeper.stdout.readline() == "mounted\n" and shutil.which("nsenter")
            yield Tmpfs(path, keeper.pid) if mounted else SizeLimit(path)
        finally:
            keeper.kill()


class Tmpfs:
    """A file system in memory, in a mount namespace that lives as long as the process which keeps it."""

    MOUNT = 'mount -t tmpfs -o size=64m tmpfs "$1" && echo mounted && exec sleep infinity'

    kind = "tmpfs"

    def __init__(self, path: Path, keeper: int):
        self.own, self.seen = path, Path(f"/proc/{keeper}/root", *path.parts[1:])
        self.prefix = ["nsenter", f"--target={keeper}", "--user", "--mount", "--preserve-credentials"]
        self._filler = self.seen / "filler"

    def fill(self, checkpoint: Path, share: float) -> None:
        """Write a file that leaves room for `share` of `checkpoint`."""
        room = int(share * sum(file.stat().st_size for file in _files(checkpoint)))
        status = os.statvfs(self.seen)
        self._filler.write_bytes(bytes(status.f_bavail * status.f_bsize - room))

    def free(self) -> None:
        """Remove that file."""
        self._filler.unlink()


class SizeLimit:
    """RLIMIT_FSIZE: no file may grow beyond a limit."""

    SET = "import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); "
    SET += "os.execvp(sys.argv[2], sys.argv[2:])"

    kind = "RLIMIT_FSIZE"

    def __init__(self, path: Path):
        self.own = self.seen = path
        self.prefix: Sequence[str] = ()

    def fill(self, checkpoint: Path, share: float) -> None:
        """Forbid files longer than `share` of the checkpoint's longest."""
        limit = int(share * max(file.stat().st_size for file in _files(checkpoint)))
        self.prefix = [sys.executable, "-c", self.SET, str(limit)]

    def free(self) -> None:
        """Lift the limit."""
        self.prefix = ()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]
