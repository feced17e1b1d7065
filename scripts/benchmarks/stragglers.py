"""A ring of two processes, one on a core that it must share: step times as predicted and as measured.

  python -m scripts.benchmarks stragglers --out benchmarks/stragglers.json

Two processes joined by `jax.distributed` (gloo, on this machine alone) hold a sequence between them, each pinned to a
core of its own; an endless loop on the second core takes half of it. Each process first measures how fast it is, and
both how fast they send; from that the simulator predicts, and tokens are dealt. Needs Linux and two cores.
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.table import Table

import ring_attention as ra
from ring_attention.commands.arguments import Parser
from ring_attention.json_files import write_json
from ring_attention.parallel.workload import Workload
from ring_attention.planning.simulator import Machine, simulate
from ring_attention.tables import show
from ring_attention.testing import random_qkv
from scripts.benchmarks.baselines import with_gradients
from scripts.launch_local import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
COMPARED = ("ring", "all_gather")
LAYOUTS = ("contiguous", "zigzag", "for_speeds")
PASSES = {"forward": False, "forward+backward": True}
CALIBRATION_TOKENS = 2048
CHUNKS = 4
"""Chunks of a shard in the layout for speeds; with two devices and these speeds more of them change nothing."""


# --- One of the two processes -----------------------------------------------------------------------------------------


def median_seconds(run, repeats: int = 5) -> float:
    """Median time of `run()` after a first one."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def calibrate(args: argparse.Namespace, mesh) -> dict[str, list[float]]:
    """Return what the simulator must know, measured by both processes at once, each its own; the same on both."""
    q, k, v, dout = random_qkv(0, 1, CALIBRATION_TOKENS, args.heads, args.heads, args.head_dim)
    attend = functools.partial(ra.blockwise_attention, causal=False)
    local = {name: with_gradients(attend, backward) for name, backward in PASSES.items()}
    multihost_utils.sync_global_devices("calibrate")
    forward, both = (
        median_seconds(lambda run=run: jax.block_until_ready(run(q, k, v, dout))) for run in local.values()
    )
    ring = [(0, 1), (1, 0)]
    sharding = jax.NamedSharding(mesh, jax.P("sp"))
    sends = []
    for size in (1 << 10, 1 << 24):
        x = jax.make_array_from_process_local_data(sharding, np.ones(size // 4, np.float32))
        turn = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.ppermute(x, "sp", ring), mesh=mesh, in_specs=jax.P("sp"), out_specs=jax.P("sp")
            )
        )
        sends.append(median_seconds(lambda turn=turn, x=x: jax.block_until_ready(turn(x))))
    pairs = args.heads * CALIBRATION_TOKENS**2
    own = np.array([forward / pairs, (both - forward) / forward, sends[0], (1 << 24) / max(sends[1] - sends[0], 1e-9)])
    shared = multihost_utils.process_allgather(jnp.asarray(own, jnp.float32)).T
    return dict(zip(("seconds_per_pair", "backward_ratio", "latency", "bandwidth"), shared.tolist(), strict=True))


def layout_of(name: str, calibration: dict[str, list[float]]) -> ra.SequenceLayout:
    """A layout for the two devices."""
    if name != "for_speeds":
        return ra.SequenceLayout(name, 2)
    return ra.SequenceLayout.for_speeds([1 / seconds for seconds in calibration["seconds_per_pair"]], CHUNKS)


def work_as(args: argparse.Namespace, rank: int) -> None:
    """Calibrate, run everything in turn, write what was measured."""
    os.sched_setaffinity(0, {args.cores[rank]})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{args.port}", num_processes=2, process_id=rank)
    mesh = ra.make_mesh(sp=2)
    calibration = calibrate(args, mesh)
    sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))
    whole = [np.asarray(x) for x in random_qkv(1, 1, args.seq_len, args.heads, args.heads, args.head_dim)]
    runs = {}
    for layout_name in LAYOUTS:
        layout, half = layout_of(layout_name, calibration), args.seq_len // 2
        mine = [layout.permute(x, axis=1)[:, rank * half : (rank + 1) * half] for x in whole]
        arrays = [jax.make_array_from_process_local_data(sharding, x) for x in mine]
        for strategy in COMPARED:
            attend = functools.partial(ra.context_attention, mesh=mesh, layout=layout, strategy=strategy)
            for name, backward in PASSES.items():
                run = with_gradients(attend, backward)
                runs[strategy, layout_name, name] = functools.partial(run, *arrays)
    for run in runs.values():
        jax.block_until_ready(run())
    seconds, order = {key: [] for key in runs}, random.Random(0)
    for _ in range(args.repeats):
        for key in order.sample(list(runs), len(runs)):
            multihost_utils.sync_global_devices("start")
            start = time.perf_counter()
            jax.block_until_ready(runs[key]())
            seconds[key].append(time.perf_counter() - start)
    facts = {"calibration": calibration, "seconds": {"/".join(key): times for key, times in seconds.items()}}
    args.folder.joinpath(f"{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


# --- The process that starts them -------------------------------------------------------------------------------------


def run_processes(args: argparse.Namespace, argv: list[str]) -> list[dict]:
    """Start the load and both processes, wait, read what they wrote."""
    endless = f"import os; os.sched_setaffinity(0, [{args.cores[1]}])\nwhile True: pass"
    with tempfile.TemporaryDirectory() as folder:
        load = [subprocess.Popen([sys.executable, "-c", endless]) for _ in range(args.loads)]
        flags = [*argv, "--port", str(free_port()), "--folder", folder]
        logs = [Path(folder, f"{rank}.log") for rank in range(2)]
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "scripts.benchmarks", "stragglers", *flags, "--rank", str(rank)],
                cwd=REPOSITORY,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            await_both(workers, logs, args.timeout)
        finally:
            for process in (*load, *workers):
                process.kill()
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def await_both(workers: list[subprocess.Popen], logs: list[Path], timeout: float) -> None:
    """Wait for both to end; raise RuntimeError as soon as one has failed, for the other would wait for it."""
    until = time.monotonic() + timeout
    while any(worker.poll() is None for worker in workers) or any(worker.returncode for worker in workers):
        for worker, log in zip(workers, logs, strict=True):
            if worker.poll():
                said = log.read_text(encoding="utf-8")[-2000:]
                raise RuntimeError(f"a process of the ring ended with {worker.returncode}:\n{said}")
        if time.monotonic() > until:
            raise RuntimeError(
                f"the ring took longer than --timeout={timeout:.0f} s; give it more, or a shorter --seq_len"
            )
        time.sleep(0.2)


def predict(args: argparse.Namespace, calibration: dict, blocking: bool) -> dict[tuple[str, str, str], float]:
    """(strategy, layout, passes) -> seconds."""
    machine = Machine(
        seconds_per_pair=tuple(calibration["seconds_per_pair"]),
        backward_ratio=statistics.mean(calibration["backward_ratio"]),
        bandwidth=min(calibration["bandwidth"]),
        latency=max(calibration["latency"]),
        blocking=blocking,
    )
    work = Workload(
        seq_len=args.seq_len, devices=2, heads=args.heads, kv_heads=args.heads, head_dim=args.head_dim, itemsize=4
    )
    found = {}
    for strategy in COMPARED:
        for name in LAYOUTS:
            one = functools.partial(simulate, strategy, layout_of(name, calibration), work, machine)
            forward, backward = one().seconds, one(backward=True).seconds
            found |= {(strategy, name, "forward"): forward, (strategy, name, "forward+backward"): forward + backward}
    return found


def table_of(args: argparse.Namespace, calibration: dict, measured: dict, predicted: dict, free: dict) -> Table:
    """Predicted and measured, side by side."""
    slower = calibration["seconds_per_pair"][1] / calibration["seconds_per_pair"][0]
    table = Table(
        title=f"T={args.seq_len} H={args.heads} D={args.head_dim} float32 causal, two processes, "
        f"the second {slower:.2f} times slower",
        caption="ms; predicted: transfers block, as on the CPU; beside: if they ran beside the computation; gain: over "
        "zigzag",
    )
    for name in ("passes", "strategy", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("predicted", "measured", "error", "gain predicted", "gain measured", "gain beside"):
        table.add_column(name, justify="right")
    for passes in PASSES:
        for strategy in COMPARED:
            for layout in LAYOUTS:
                key, base = (strategy, layout, passes), (strategy, "zigzag", passes)
                gains = [f"{times[base] / times[key]:.2f}" for times in (predicted, measured, free)]
                off = predicted[key] / measured[key] - 1
                cells = [f"{predicted[key] * 1e3:.0f}", f"{measured[key] * 1e3:.0f}", f"{off:+.0%}", *gains]
                table.add_row(passes, strategy, layout, *cells, end_section=layout == LAYOUTS[-1])
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("--seq_len", type=int, default=8192, metavar="T", help="tokens")
    parser.add_argument("--heads", type=int, default=4, metavar="H")
    parser.add_argument("--head_dim", type=int, default=64, metavar="D")
    parser.add_argument("--loads", type=int, default=1, help="endless loops on the second core; 0: both are alike")
    parser.add_argument(
        "--cores", type=int, nargs=2, default=sorted(os.sched_getaffinity(0))[:2], help="of each process"
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median counts")
    parser.add_argument("--timeout", type=float, default=900, help="seconds until the processes are given up")
    parser.add_out()
    for name, kind in dict(rank=int, port=int, folder=Path).items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run, predict, print, write."""
    args = parse(argv)
    if args.rank is not None:
        work_as(args, args.rank)
        return
    facts = run_processes(args, argv)
    calibration = facts[0]["calibration"]
    measured = {
        tuple(key.split("/")): statistics.median(map(max, zip(*(fact["seconds"][key] for fact in facts), strict=True)))
        for key in facts[0]["seconds"]
    }
    predicted, free = (predict(args, calibration, blocking) for blocking in (True, False))
    show(table_of(args, calibration, measured, predicted, free))
    if args.out:
        rows = [
            dict(strategy=key[0], layout=key[1], passes=key[2], measured=measured[key], predicted=predicted[key])
            for key in measured
        ]
        write_json(args.out, dict(calibration=calibration, rows=rows))
