"""The faults: what is done to a run, and what must come of it."""

import contextlib
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from scripts.verify.soak.chain import Chain, TooLateError
from scripts.verify.soak.run import EndedError, Run
from scripts.verify.soak.verdicts import CORRUPTED, EXIT, LOSSES, LOST, MESSAGE, worst_relative_difference

SIGTERM_SECONDS, PEERS_SECONDS = 30.0, 60.0
"""So long a preempted run has to write its checkpoint, and so long the others have to see that a process is lost."""

MOUNT = 'mount -t tmpfs -o size=32m tmpfs "$1" && echo mounted && exec sleep infinity'
TOLERANCE, STEPS_COMPARED, SKIPPED, LAYERS = 1e-5, 6, 4, 2  # of another mesh; updates not finite; of configs/tiny.py
MESHES = [
    [
        f"--config.mesh.fsdp={fsdp}",
        f"--config.mesh.sp={sp}",
        "--config.mesh.tp=1",
        f"--config.attention.layout={layout}",
    ]
    for fsdp, sp, layout in ((1, 4, "striped"), (2, 4, "contiguous"), (1, 2, "zigzag"))  # configs/tiny.py has 2x2x2
]


def kill(chain: Chain, moment: str = "training") -> None:
    """SIGKILL in training, while a checkpoint lies half written, when one was just written, or again in a start."""
    chain.train_a_while(0 if moment.startswith("sav") else 1)
    run, newest = chain.run, chain.run.newest()
    if moment == "saving":
        run.until(run.unfinished, "begin a checkpoint")
        chain.outcome.notes.append(f"{[path.name for path in run.unfinished()]} half written")
    if moment == "saved":  # and the oldest is being removed
        run.until(lambda: run.newest() > newest, "complete a checkpoint")
    if moment == "starting":
        _kill_and_start(chain)
    chain.kill()
    chain.restart()


def _kill_and_start(chain: Chain) -> None:
    """SIGKILL, start again and wait for a random part of a start."""
    chain.kill()
    seconds = chain.rng.uniform(0, chain.startup)
    chain.run.start()
    time.sleep(seconds)
    chain.outcome.notes.append(f"again {seconds:.1f} s after the start")


def terminate(chain: Chain, moment: str = "training") -> None:
    """SIGTERM to one process, in training or in a start: all write a checkpoint of the step they reached, and end."""
    chain.train_a_while()
    if moment == "starting":
        _kill_and_start(chain)
    run, began = chain.run, time.monotonic()
    chain.rng.choice(run.children).send_signal(signal.SIGTERM)
    codes = run.codes("end after SIGTERM", SIGTERM_SECONDS)
    chain.outcome.notes.append(f"ended in {time.monotonic() - began:.1f} s")
    chain.take_in_death()
    trained = run.steps_trained() > 1  # in its first step it may not have been ready for the signal
    chain.require_exit(run, codes, 128 + signal.SIGTERM, *([] if trained else [-signal.SIGTERM]))
    saved = f"step {run.steps_done()} was done, {run.newest()} is the newest checkpoint"
    chain.outcome.require(not trained or run.newest() == run.steps_done(), LOST, saved)
    chain.outcome.bound = 0 if trained else chain.outcome.bound
    chain.restart()


def flip(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four of them changed."""
    places = rng.sample(range(len(content)), min(len(content), rng.randint(1, 4)))
    return bytes(byte ^ rng.randint(1, 255) if i in places else byte for i, byte in enumerate(content))


def truncate(content: bytes, rng: random.Random) -> bytes:
    """Return the beginning of the bytes."""
    return content[: rng.randrange(len(content))]


def damage(chain: Chain, spoil: Callable[[bytes, random.Random], bytes]) -> None:
    """SIGKILL, and spoil a file of the newest checkpoint: it is noticed, named and put aside."""
    chain.train_a_while(0, 5, checkpoints=2)
    chain.kill()
    *_, good, newest = chain.run.complete()
    path, run = chain.run.checkpoints / str(newest), chain.run
    file = chain.rng.choice(sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size))
    file.write_bytes(spoil(file.read_bytes(), chain.rng))
    chain.outcome.notes.append(f"{newest}/{file.relative_to(path)} damaged")
    chain.outcome.bound += newest - good
    if chain.restart([good, newest]) == newest:  # orbax leaves files that a restore has no need of
        run.until_step(run.steps_done() + 4)  # what was spoilt in the optimizer is in a later loss
        chain.outcome.require_lines(run.lines(), chain.reference)
        chain.outcome.notes.append("a file that is not read")
        return
    said = any(str(path) in child.read(".err") for child in run.children)
    chain.outcome.require(said, MESSAGE, f"stderr does not name {path}")
    aside = any((run.path / "damaged").glob(f"{newest}-*"))
    chain.outcome.require(aside, CORRUPTED, f"checkpoint {newest} was not put aside into damaged/")


def disk_full(chain: Chain) -> None:
    """While a copy of the run trains, its disk fills up to less than a checkpoint; then there is room again.

    The disk is a tmpfs in a mount namespace or, where none may be mounted, any under RLIMIT_FSIZE.
    """
    chain.train_a_while(0, 5, checkpoints=1)
    chain.spare.mkdir(parents=True)
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", str(chain.spare)]
    words = words if shutil.which("unshare") and shutil.which("nsenter") else ["false"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as keeper:
        mounted = keeper.stdout.readline() == "mounted\n"
        seen = Path(f"/proc/{keeper.pid}/root", *chain.spare.parts[1:]) if mounted else chain.spare
        enter = ["nsenter", f"--target={keeper.pid}", "--user", "--mount", "--preserve-credentials"] if mounted else []
        filler, share = seen / "filler", chain.rng.uniform(0.1, 0.9)
        try:
            with chain.copied(seen / "run") as copy:
                where = [f"--config.run_dir={chain.spare / 'run'}"]  # as the processes see it
                copy.start(*where, prefix=enter)
                copy.until_trained()
                newest = copy.newest()
                fill = lambda: copy.is_dead() or _leave_room(copy, share, filler if mounted else None)  # noqa: E731
                copy.until(fill, "stop for want of room", may_end=True)
                chain.outcome.step = done = copy.steps_done()
                if done == chain.trainer.num_steps:
                    raise TooLateError
                chain.require_exit(copy, copy.codes("end"), 1)
                chain.require_one_line(copy, "full" if mounted else "large")
                kept = f"checkpoint {newest} was there before, {copy.newest()} is the newest after"
                chain.outcome.require(copy.newest() >= newest, CORRUPTED, kept)
                chain.outcome.bound = 2 * chain.trainer.checkpoint_every  # one beyond the checkpoint that did not fit
                chain.outcome.notes.append(f"{'tmpfs' if mounted else 'RLIMIT_FSIZE'}: ended after step {done}")
                filler.unlink(missing_ok=True)
                newest = copy.newest()
                copy.start(*where, prefix=enter)
                chain.require_resumed(copy, copy.until_trained(), [newest], done)
        finally:
            keeper.kill()


def _leave_room(run: Run, share: float, filler: Path | None) -> None:
    """Leave room for less than a checkpoint, also of what old ones free; without a filler limit the size of files."""
    with contextlib.suppress(OSError):  # the run may be faster, or have ended
        sizes = [file.stat().st_size for file in (run.checkpoints / str(run.newest())).rglob("*")]
        if filler is None:
            resource.prlimit(run.children[0].pid, resource.RLIMIT_FSIZE, (int(share * max(sizes)),) * 2)
            return
        disk = os.statvfs(filler.parent)
        with filler.open("ab") as file:
            file.write(bytes(max(0, disk.f_bavail * disk.f_bsize - int(share * sum(sizes)))))


def second_run(chain: Chain) -> None:
    """Start the same command while the run trains: it is refused, and the run goes on."""
    chain.train_a_while()
    run, second = chain.run, Run(chain.trainer, chain.run.path, chain.deadline)
    second.start()
    try:
        chain.require_exit(second, second.codes("be refused"), 2)
        chain.require_one_line(second, str(run.path))
    finally:
        second.kill()
    run.until_step(run.steps_done() + 2)
    chain.outcome.require_lines(run.lines(), chain.reference)


def other_mesh(chain: Chain) -> None:
    """A copy on another mesh, in another layout: the same losses but for the order of sums."""
    chain.train_a_while(0, 5, checkpoints=1)
    flags = chain.rng.choice(MESHES)
    with chain.copied(chain.spare) as copy:
        newest = copy.newest()
        copy.start(*flags)
        resumed = copy.until_trained()
        copy.until_step(newest + STEPS_COMPARED)
    chain.outcome.require(resumed == newest, CORRUPTED, f"went on from {resumed}, checkpoint {newest} was the newest")
    worst = worst_relative_difference(copy.lines(), chain.reference, after=resumed)
    chain.outcome.notes.append(f"{' '.join(flag.rpartition('.')[2] for flag in flags)}: losses differ by {worst:.1e}")
    chain.outcome.require(worst <= TOLERANCE, LOSSES, f"{chain.outcome.notes[-1]}, allowed {TOLERANCE:g}")


def not_finite(chain: Chain) -> None:
    """A weight of a copy's newest checkpoint is infinite: the run stops and says in which step, batch and layer."""
    chain.train_a_while(0, 5, checkpoints=1)
    with chain.copied(chain.spare) as copy:
        layer, newest = chain.rng.randrange(LAYERS), copy.newest()
        copy.start(f"--layer={layer}", command=chain.trainer.poison)
        if any(copy.codes("write an infinite weight")):
            raise EndedError(f"no infinite weight was written: {copy.children[0].last_words()}")
        copy.start(f"--config.optimizer.max_skipped_updates={SKIPPED}")
        chain.require_exit(copy, copy.codes("stop because nothing is finite"), 1)
    chain.require_one_line(copy, f"step {newest + SKIPPED}", "batch", f"layer {layer}")
    skipped = sum(line.get("skipped", 0) for line in copy.lines() if line["step"] > newest)
    chain.outcome.require(skipped == SKIPPED, MESSAGE, f"metrics.jsonl counts {skipped} skipped updates, not {SKIPPED}")


def lose_process(chain: Chain, number: signal.Signals = signal.SIGKILL) -> None:
    """SIGKILL or SIGSTOP, as if its machine had hung, to one process of a run: the others stop and say which."""
    chain.train_a_while(1, 6)
    victim = chain.rng.randrange(len(chain.run.children))
    lost = chain.run.children[victim]
    lost.send_signal(number)
    began = time.monotonic()
    codes = chain.run.codes(f"end after {number.name} to process {victim}", PEERS_SECONDS, but=lost)
    chain.outcome.notes.append(f"{number.name} to {victim}, the others ended in {time.monotonic() - began:.1f} s")
    chain.kill()
    others = [child for child in chain.run.children if child is not lost]
    chain.outcome.require(set(codes) == {1}, EXIT, f"the others ended with {codes}, not 1: {others[0].last_words()}")
    for child in others:
        named = any(f"process {victim}" in line for line in child.read(".err").splitlines() if "error" in line)
        chain.outcome.require(named, MESSAGE, f"no line names process {victim}: {child.last_words()}")
    chain.restart()


SHARED = {
    "lose_process": lose_process,
    "freeze_process": functools.partial(lose_process, number=signal.SIGSTOP),
    "terminate_process": terminate,
}
FAULTS: dict[str, Callable[[Chain], None]] = {
    "kill": kill,
    **{f"kill_{moment}": functools.partial(kill, moment=moment) for moment in ("saving", "saved", "starting")},
    "terminate": terminate,
    "terminate_starting": functools.partial(terminate, moment="starting"),
    "flip": functools.partial(damage, spoil=flip),
    "truncate": functools.partial(damage, spoil=truncate),
    "disk_full": disk_full,
    "second_run": second_run,
    "other_mesh": other_mesh,
    "not_finite": not_finite,
    **SHARED,
}
"""Name -> fault. Those in SHARED are done to a run of several processes."""
