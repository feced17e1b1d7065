"""Checkpoints: the newest few states of a run and where its data had got to, written while training goes on."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import jax
import orbax.checkpoint as ocp

from ring_attention.checks import ConfigError, one_line, require
from ring_attention.training.fault_tolerance.disk import require_room, require_there, silence_threads
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.fault_tolerance.integrity import (
    MANIFEST,
    NOT_ITS_FAULT,
    DamagedError,
    fingerprints,
    read_contents,
    require_written,
    sign,
    write_manifest,
)
from ring_attention.training.processes import is_first
from ring_attention.training.stored_arrays import require_fit

KEEP = 3
"""Checkpoints that stay; each holds parameters and two moments, 12 bytes a parameter."""

DAMAGED = "damaged"
"""Folder beside the checkpoints for those that could not be read."""

_UNFINISHED = "*.orbax-checkpoint-tmp*"
_NONE_IS_WHOLE = "put a copy in their place, or start another run with --config.run_dir=PATH"
_NOT_ITS_FAULT = [os.strerror(number) for number in NOT_ITS_FAULT]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Return False: orbax would ask JAX's preemption service, which counts the questions (`Preemption`)."""
        return False

    def has_failed(self) -> bool:
        """Return whether the thread that finishes a save has failed; orbax tells it at the next save only."""
        return self._finalize_thread.map(lambda thread: thread is not None and thread.exception is not None)


class Restored(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
      step: the step after which it was saved.
      state: what was saved, on the devices that were asked for.
      data: the position in the data.
    """

    step: int
    state: Any
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder, as a context manager.

    Every process of a run makes one and calls it alike. A checkpoint that was not written to its end does not count,
    and one that was damaged since is noticed: its files are listed with their digests, and each array is stored with
    its fingerprint.
    """

    def __init__(self, path: Path, whole: Any = None):
        """Open `path`, a folder, made if there is none; the KEEP newest checkpoints stay in it.

        `whole` is a pytree as the states, of shapes as they are without padding (`sharding.stored_shape`), by which a
        state that one mesh padded comes back on another; None: states have no padding.
        """
        silence_threads()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(KEEP),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._list_files),
        )
        self._path, self._whole = Path(path).absolute(), whole
        self._remove_unfinished()
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = _Manager(self._path, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Start to save; returns once `state` is copied to the host, so that its buffers may be donated.

        Args:
          step: newer than the latest.
          state: pytree of jax arrays, sharded as they may be.
          data: what JSON can hold: the position in the data.

        Raises:
          ValueError: if `step` is not newer than the latest.
          RunError: if this save, or the one before, could not be written.
        """
        latest = self.latest_step()
        problem = f"step={step} is not newer than the latest checkpoint, {latest}; save each step once"
        require(latest is None or step > latest, problem)
        require_there(self._path)  # orbax would make it anew, in a folder that has lost the rest of the run
        contents = sign({"data": data, "fingerprints": fingerprints(state, self._whole), "files": MANIFEST})
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(contents))
        self._writing(lambda: self._manager.save(step, args=args))

    def require_room(self, abstract_state: Any) -> None:
        """Raise ConfigError unless the disk has room for KEEP checkpoints and the one that is being written."""
        num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))
        require_room(self._path.parent, num_bytes, max(0, KEEP + 1 - len(self._manager.all_steps())))

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, saved or being saved, or None."""
        return self._manager.latest_step()

    def restore_newest(self, abstract_state: Any, warn: Callable[[str], None]) -> Restored | None:
        """Return the newest checkpoint that is whole, or None where there is no checkpoint.

        Damaged ones that are newer are named to `warn` and moved to the folder DAMAGED beside this one, so that nothing
        is lost. Where several processes read together, the others may find nothing wrong in their parts, so there the
        run ends, and the next start takes the one before.

        Args:
          abstract_state: the state as jax.ShapeDtypeStructs with shardings, on any mesh: that is how it comes back.
          warn: takes a line.

        Raises:
          ConfigError: if the checkpoints' arrays have other names, shapes or dtypes.
          RunError: if there are checkpoints and none is whole, or several processes found the newest damaged.
        """
        self.wait()
        steps, failures = sorted(self._manager.all_steps(), reverse=True), {}
        for step in steps:
            try:
                restored = self.restore(step, abstract_state)
            except (DamagedError, ConfigError) as error:
                failures[step] = type(error)(str(error))  # its traceback would hold the arrays that were read
            else:
                for other, error in failures.items():
                    warn(f"{error}; moved to {self._set_aside(other)}, going on from step {step}")
                self._manager.reload()
                return restored
            if jax.process_count() > 1:
                self._end_together(step, failures[step], is_last=step == steps[-1])
        self._require_none_lost(steps, failures)
        return None

    def _end_together(self, step: int, error: Exception, *, is_last: bool) -> NoReturn:
        """End a run of several processes whose newest checkpoint this process cannot use."""
        if isinstance(error, ConfigError):
            raise error
        if is_last:
            raise RunError(f"{error}, and there is no other; {_NONE_IS_WHOLE}")
        remedy = "start the run again, it goes on from the checkpoint before"
        raise RunError(f"{error}; moved to {self._set_aside(step)}; {remedy}")

    def _require_none_lost(self, steps: list[int], failures: dict[int, Exception]) -> None:
        """Raise unless there were no checkpoints to use, and none that were moved aside."""
        aside = self._path.parent / DAMAGED
        if not failures:
            empty = not aside.exists() or not any(aside.iterdir())
            if not empty:
                raise RunError(f"{self._path} holds no checkpoint, but {aside} holds damaged ones; {_NONE_IS_WHOLE}")
            return
        if all(isinstance(error, ConfigError) for error in failures.values()):
            raise failures[steps[0]]
        raise RunError(f"{failures[steps[0]]}, and none of the checkpoints {sorted(steps)} is whole; {_NONE_IS_WHOLE}")

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Return the checkpoint of `step`, one that is there.

        Raises:
          ConfigError: if the checkpoint's arrays have other names, shapes or dtypes.
          DamagedError: if it cannot be read, or not as it was written.
          RunError: if the file system cannot be read now.
          ValueError: if there is no such step.
        """
        self.wait()
        steps = self._manager.all_steps()
        require(step in steps, f"step={step} has no checkpoint in {self._path}; choose one of {sorted(steps)}")
        path = self._path / str(step)
        try:
            contents = read_contents(path)
            require_written(path, contents, jax.process_index(), jax.process_count())
            stored = self._manager.item_metadata(step)["state"].tree
            same = require_fit(path, stored, abstract_state, self._whole)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state, strict=same))
            state = self._manager.restore(step, args=args)["state"]
        except (ConfigError, DamagedError, jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as error:  # of orbax, tensorstore, JSON: whatever a damaged file makes them raise
            if any(reason in str(error) for reason in _NOT_ITS_FAULT):
                raise RunError(f"{path} cannot be read: {_shorten(one_line(error))}; start the run again") from error
            raise DamagedError(f"{path} is damaged: {_shorten(one_line(error))}") from error
        kinds = jax.tree.map(lambda x, need: (x.dtype, x.shape) == (need.dtype, need.shape), state, abstract_state)
        found = fingerprints(state, self._whole) if jax.tree.all(kinds) else {}
        wrong = [name for name, word in contents["fingerprints"].items() if found.get(name) != word]
        if wrong:
            rest = f" and {len(wrong) - 1} more arrays" if wrong[1:] else ""
            raise DamagedError(f"{path} is damaged: {wrong[0]}{rest} changed since it was written")
        return Restored(step, state, contents["data"])

    def _set_aside(self, step: int) -> Path:
        """Move a checkpoint out of the way, once for all processes, and return where it lies now."""
        folder = self._path.parent / DAMAGED
        folder.mkdir(exist_ok=True)
        target = folder / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            os.rename(self._path / str(step), target)
        except FileNotFoundError:  # another process was faster
            return folder
        return target

    def _writing(self, write: Callable[[], Any]) -> None:
        """Call `write`; where the disk refuses, clean up and raise RunError."""
        try:
            write()
        except (ConfigError, jax.errors.JaxRuntimeError):  # the latter of a collective: `Peers` knows more
            raise
        except Exception as error:  # OSError, or tensorstore's ValueError that holds one, from this thread or another
            reason = one_line(error)
            if os.strerror(errno.ENOSPC) in reason and self._path.is_dir():
                free = shutil.disk_usage(self._path).free
                reason, remedy = f"the disk is full ({free / 2**20:.0f} MiB free)", "make room"
            else:
                reason, remedy = _shorten(reason), "mend it"
            require_there(self._path)
            self._remove_unfinished()
            kept = written_steps(self._path)
            last = f"the last good one is {self._path / str(kept[-1])}" if kept else "there is none yet"
            raise RunError(
                f"{self._path}: a checkpoint could not be written: {reason}; {last}; {remedy}, and start the run again"
            ) from error

    def _list_files(self) -> None:
        """List the files of the checkpoint that orbax has written to its end and is about to give its name."""
        for folder in self._path.glob(_UNFINISHED):
            write_manifest(folder)

    def _remove_unfinished(self) -> None:
        """Make room: what was not written to its end is of no use."""
        if is_first():
            for folder in self._path.glob(_UNFINISHED):
                shutil.rmtree(folder, ignore_errors=True)

    def check(self) -> None:
        """Raise RunError if a save that was started has failed meanwhile; costs nothing."""
        if self._manager.has_failed():
            self.wait()

    def wait(self) -> None:
        """Return when every save that was started lies on disk; raise RunError if one failed."""
        self._writing(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait, then let go of the folder."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif jax.process_count() == 1:  # what is being written need not be lost; several processes might wait in vain
            with contextlib.suppress(RunError):
                self.wait()


def written_steps(path: Path) -> list[int]:
    """Return the steps, ascending, whose checkpoints in a folder are complete: orbax gives each its name only then."""
    return sorted(int(file.name) for file in path.glob("*") if file.name.isdecimal())


def _shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[:length].rstrip() + "..."
