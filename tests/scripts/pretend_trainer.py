"""A train.py that learns nothing and takes milliseconds, to test the soak harness with; it can break every promise.

The environment variable BREAKS names the one that it breaks; without it, it keeps them all.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

BREAKS = os.environ.get("BREAKS", "")
FLAGS = dict(arg.split("=", 1) for arg in sys.argv[1:] if "=" in arg)
FOLDER = Path(FLAGS["--config.run_dir"])
CHECKPOINTS, METRICS = FOLDER / "checkpoints", FOLDER / "metrics.jsonl"
ME, PROCESSES = int(FLAGS.get("--process_id", 0)), int(FLAGS.get("--num_processes", 1))
MEETING = FOLDER / f"meeting-{FLAGS.get('--coordinator_address', os.getpid())}"  # of the processes of one life
SECONDS_OF_A_STEP = 0.006
KEEP = 3


def main():
    lock = open_folder()
    if "--poison" in sys.argv:
        return save(newest(), math.inf if FLAGS["--layer"] == "1" else -math.inf)
    (MEETING / str(ME)).write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: (MEETING / "stop").touch())
    train() if ME == 0 else stand_by()
    lock.close()
    sys.exit(143 if (MEETING / "stop").exists() else 0)


def train():
    num_steps, every = int(FLAGS["--config.num_steps"]), int(FLAGS["--config.checkpoint_every"])
    start, weight = resume()
    writer = threading.Thread()
    with METRICS.open("a") as metrics:
        for step in range(start + 1, num_steps + 1):
            finite = math.isfinite(weight)
            weight = weight * 1.37 % 1 if finite else weight
            loss = weight + 1e-4 * (BREAKS == "mesh" and "--config.mesh.sp" in FLAGS) if finite else None
            line = {"step": step, "loss": loss, "tokens_per_second": time.time(), "skipped": int(not finite)}
            if not (BREAKS == "metrics" and step == start + 2 > 2):
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
            if not finite and step == start + int(FLAGS["--config.optimizer.max_skipped_updates"]):
                fail(0 if BREAKS == "not finite" else 1, f"step {step}: no loss in batch 7, layer {int(weight > 0)}")
            print(f"step {step}/{num_steps}", flush=True)
            leave_if_a_process_is_lost()
            stop = (MEETING / "stop").exists() and BREAKS != "sigterm"
            if step in (num_steps, step // every * every) or stop:
                if writer.ident:
                    writer.join()
                writer = threading.Thread(target=save_or_leave, args=(step, weight))
                writer.start()
            if stop:
                break
            time.sleep(SECONDS_OF_A_STEP)
    if writer.ident:
        writer.join()
    (MEETING / "done").touch()


def stand_by():
    """What processes but the first do; all of the work is the first one's."""
    while not (MEETING / "done").exists():
        leave_if_a_process_is_lost()
        time.sleep(SECONDS_OF_A_STEP)


def leave_if_a_process_is_lost():
    for file in MEETING.glob("[0-9]"):
        if not works(file.read_text() or os.getpid()) and BREAKS != "peers" and not (MEETING / "done").exists():
            with contextlib.suppress(FileExistsError), (MEETING / "lost").open("x") as first:
                first.write(f"process {file.name} was lost")
            fail(1, "another process was lost" if BREAKS == "name" else (MEETING / "lost").read_text())


def works(process):
    """Whether a process is there and not stopped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "TZ"
    except FileNotFoundError:
        return False


def open_folder():
    """Return the open file that keeps others out of the folder."""
    MEETING.mkdir(parents=True, exist_ok=True)
    lock = (FOLDER / f"lock_{ME}").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if BREAKS != "lock":
            fail(2, f"run_dir={FOLDER}: is in use by another run")
    return lock


def resume():
    """Return the newest good checkpoint's step and weight, and cut the metrics to it."""
    for half in CHECKPOINTS.glob("*tmp"):
        shutil.rmtree(half)
    step, weight = 0, 0.123
    while newest():
        path = CHECKPOINTS / str(newest())
        try:
            step, weight = int(path.name), read(path)
            break
        except (OSError, ValueError):
            if BREAKS == "atomic":
                fail(1, f"{path}: cannot be read")
            print(f"{'a checkpoint' if BREAKS == 'naming' else path} is damaged", file=sys.stderr)
            (FOLDER / "damaged").mkdir(exist_ok=True)
            path.rename(FOLDER / "damaged" / f"{path.name}-{time.time_ns()}")
    if step:
        print(f"Going on from step {step}.", flush=True)
        time.sleep(1000 if BREAKS == "hang" else 0)
        weight *= 1 + 2**-52 if BREAKS == "bits" else 1
    lines = METRICS.read_text().splitlines(keepends=True) if METRICS.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    (FOLDER / "partial").write_text("".join(kept))
    (FOLDER / "partial").replace(METRICS)
    return step, weight


def newest():
    return max((int(path.name) for path in CHECKPOINTS.glob("*") if path.name.isdigit()), default=0)


def read(path):
    content = (path / "weight").read_bytes()
    if BREAKS == "digest":
        return 0.5
    if hashlib.sha256(content).hexdigest() != (path / "digest").read_text():
        raise ValueError("damaged")
    return json.loads(content.strip(b"\0"))


def save_or_leave(step, weight):
    """Save; end the process if that fails, though this is another thread."""
    try:
        save(step, weight)
    except OSError as error:
        if BREAKS == "room":
            shutil.rmtree(CHECKPOINTS)
        fail(1, f"{CHECKPOINTS}: {error.strerror}")


def save(step, weight):
    if BREAKS == "interval" and step % 9 and not (MEETING / "stop").exists():
        return
    half = CHECKPOINTS / (f"{step}" if BREAKS == "atomic" else f"{step}.orbax-checkpoint-tmp")
    half.mkdir(parents=True, exist_ok=True)
    content = json.dumps(weight).encode().ljust(50_000, b"\0")
    (half / "weight").write_bytes(content)
    time.sleep(0.02)
    (half / "digest").write_text(hashlib.sha256(content).hexdigest())
    if BREAKS != "atomic":
        shutil.rmtree(CHECKPOINTS / str(step), ignore_errors=True)
        half.rename(CHECKPOINTS / str(step))
    done = sorted(int(path.name) for path in CHECKPOINTS.glob("*") if path.name.isdigit())
    for old in done[:-KEEP]:
        shutil.rmtree(CHECKPOINTS / str(old))


def fail(code, message):
    print(f"train.py: error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()
