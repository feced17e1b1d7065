"""A disk without room: a small tmpfs or, where none may be mounted, a limit on the size of files."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from .life import Life, TooLateError
from .scene import Scene
from .trainer import Folder, steps_trained
from .verdicts import CORRUPTED


def disk_full(scene: Scene) -> None:
    """While a copy of the run trains, its disk fills up to less than a checkpoint; then there is room again."""
    chain, outcome = scene.chain, scene.outcome
    chain.until(chain.folder.newest, "write a checkpoint")
    scene.train_a_while(0, 5)
    with scene.frozen(), small_disk(scene.spare) as disk:
        copy = chain.copy(disk.seen / "run")
        room = scene.rng.uniform(0.1, 0.9)
        with scene.started(disk.own / "run", prefix=disk.prefix) as life:
            life.until(lambda: steps_trained(life), "go on from a copy", chain.deadline)
            newest = copy.newest()
            life.until(lambda: _has_ended(life) or disk.fill(copy, life, room), "stop for want of room", chain.deadline)
        outcome.step = copy.steps_done()
        if outcome.step == chain.trainer.num_steps:
            raise TooLateError("the copy was done before its disk was full")
        scene.require_exit(life, life.codes("end", 0), 1)
        scene.require_one_line(life.stderr, disk.complaint)
        kept = f"checkpoint {newest} was there before, {copy.newest()} is the newest after"
        outcome.require(copy.newest() >= newest, CORRUPTED, kept)
        outcome.bound = 2 * chain.trainer.checkpoint_every  # one beyond the checkpoint that did not fit
        outcome.notes.append(f"{disk.kind}: ended with {life.children[0].code} after step {outcome.step}")
        disk.free()
        with scene.started(disk.own / "run", prefix=disk.prefix) as life:
            scene.require_going_on(life, copy, outcome.step)


def _has_ended(life: Life) -> bool:
    return life.children[0].code is not None


class SmallDisk(Protocol):
    """A folder that can be made small.

    Attributes:
      kind: what makes it small.
      complaint: what the system says when it is full.
      seen: its path for the harness.
      own: its path for a command that comes after `prefix`.
      prefix: what such a command comes after.
    """

    kind: str
    complaint: str
    seen: Path
    own: Path
    prefix: Sequence[str]

    def fill(self, run: Folder, life: Life, share: float) -> None:
        """Leave `life` less room than a checkpoint of `run` takes, only `share` of it; call it again and again."""

    def free(self) -> None:
        """Make room."""


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[SmallDisk]:
    """Yield a disk at `path`, a new folder, that can be as small as this machine permits."""
    path.mkdir(parents=True)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", Tmpfs.MOUNT, "sh", str(path)]
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        yield SizeLimit(path)
        return
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as keeper:
        try:
            yield Tmpfs(path, keeper.pid) if keeper.stdout.readline() == "mounted\n" else SizeLimit(path)
        finally:
            keeper.kill()


class Tmpfs:
    """A file system in memory, in a mount namespace that lives as long as the process which keeps it."""

    MOUNT = 'mount -t tmpfs -o size=32m tmpfs "$1" && echo mounted && exec sleep infinity'

    kind, complaint = "tmpfs", "full"

    def __init__(self, path: Path, keeper: int):
        self.own, self.seen = path, Path(f"/proc/{keeper}/root", *path.parts[1:])
        self.prefix = ["nsenter", f"--target={keeper}", "--user", "--mount", "--preserve-credentials"]
        self._filler = self.seen / "filler"

    def fill(self, run: Folder, life: Life, share: float) -> None:
        """Append to a file until only that much is left, also of what old checkpoints leave when they are removed."""
        status = os.statvfs(self.seen)
        excess = status.f_bavail * status.f_bsize - int(share * sum(_sizes(run)))
        with contextlib.suppress(OSError), self._filler.open("ab") as filler:  # the run may have been faster
            filler.write(bytes(max(0, excess)))

    def free(self) -> None:
        """Remove that file."""
        self._filler.unlink()


class SizeLimit:
    """RLIMIT_FSIZE: no file may grow beyond a limit."""

    kind, complaint = "RLIMIT_FSIZE", "large"

    def __init__(self, path: Path):
        self.own = self.seen = path
        self.prefix: Sequence[str] = ()

    def fill(self, run: Folder, life: Life, share: float) -> None:
        """Forbid files longer than that share of the checkpoint's longest."""
        limit = int(share * max(_sizes(run)))
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(life.children[0].pid, resource.RLIMIT_FSIZE, (limit, limit))

    def free(self) -> None:
        """The limit has ended with the process."""


def _sizes(run: Folder) -> list[int]:
    """Bytes of each file of the newest checkpoint; it may be removed meanwhile."""
    sizes = [0]
    with contextlib.suppress(FileNotFoundError):
        for file in (run.checkpoints_path / str(run.newest())).rglob("*"):
            sizes.append(file.stat().st_size)
    return sizes
