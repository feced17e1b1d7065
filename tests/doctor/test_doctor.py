"""The doctor as a person calls it: what is off is said, and is in the exit status and the file."""

import json
import types

import jax
import pytest
from command_lines import call_command

from ring_attention.attention import kernels
from ring_attention.commands import doctor
from ring_attention.doctor import checkup
from ring_attention.doctor.advice import advise
from ring_attention.doctor.report import rows_of
from ring_attention.hardware.chips import CHIPS, GiB
from ring_attention.hardware.reach import kernel_rate
from ring_attention.training.flags import parse_config

H100 = CHIPS["h100"]


@pytest.fixture(autouse=True)
def _started():
    """The command would ask for fewer simulated devices than other tests of this process need."""
    assert jax.device_count() == 8


def _found(**changes):
    """What the parts find on two good H100s, but for some of the figures."""
    peak, published = H100.flops / 1e12, kernel_rate(H100, "cudnn", 128)
    forward, backward = published.forward * peak, published.backward * peak
    figures = dict(ratio=1.1, forward=forward, backward=backward, matmul=0.7 * H100.flops, along=0.95 * H100.link)
    figures |= dict(against=0.95 * H100.link, hidden=0.97, predicted=10 * GiB, peak=10.5 * GiB, limit=H100.memory)
    assert {*changes} <= {*figures}
    figures |= changes
    case = dict(kernel="cudnn", shape="config", shard=8192, devices=8, place=3, heads=32, kv_heads=8, head_dim=128)
    passes = {
        name: {"hops": figures[name], "one call": figures[name], "ratio": 1.0} for name in ("forward", "backward")
    }
    device = {"kind": "NVIDIA H100 80GB HBM3", "memory": figures["limit"], "compute_capability": "9.0"}
    limits = {"versions": {"jax": "0.11.2"}, "cudnn": "9.10.2", "driver": "580.1", "memory_fraction": "0.92"}
    return {
        "limits": limits | {"host_memory": 2**37, "devices": [device, device]},
        "step": {
            "layers": 4,
            "parameters": 977_000_000,
            "tokens": 8192,
            "seconds": 0.4,
            "tokens_per_second": 41_000,
            "mfu": 0.4,
            "predicted_seconds": 0.38,
            "compiled_bytes": int(10.2 * GiB),
            "peak_bytes": figures["peak"],
            "predicted_bytes": figures["predicted"],
            "predicted_for": "h100",
        },
        "kernels": {
            "cudnn": {"dtype": "bfloat16", "ratios": {"out": 1.0, "dq": 1.0, "dk": figures["ratio"], "dv": 1.0}},
            "splash": {"refused": "runs on tpu devices"},
        },
        "rates": {"matmul": figures["matmul"], "rows": [case | {"dtype": "bfloat16", "passes": passes}]},
        "links": {way: {"bandwidth": figures[way], "latency": 4e-6, "hops": []} for way in ("along", "against")},
        "overlap": {"kernel": "cudnn", "ring": 1.0, "without transfers": 0.99, "transfers alone": 0.3}
        | {"hidden": figures["hidden"]},
    }


FAULTS = [
    (dict(ratio=9.1), "kernels", "dk is 9.1 times as far from the oracle"),
    (dict(forward=300.0), "rates", "do 300 TFLOP/s forward"),
    (dict(backward=100.0), "rates", "do 100 TFLOP/s backward"),
    (dict(against=90e9), "links", "a hop against the ring carries 90 GB/s, h100's link is published at 450"),
    (dict(hidden=0.3), "overlap", "hops hide 30% of their transfers"),
    (dict(peak=12 * GiB), "step", "takes 12.00 GiB where 10.00 are predicted"),
    (dict(limit=59 * GiB), "limits", "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"),
]


def _of_two_h100s(monkeypatch, found):
    """Let the command find two H100s, on which its parts measure this."""
    devices = [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")] * 2
    config = parse_config([], "gpu_8xh100_7b")
    opened = checkup.Checkup(devices=devices, config=config, tokens=8192, layers=4, repeats=3)
    monkeypatch.setattr(doctor, "open_checkup", lambda args, flags: opened)
    for name, result in found.items():
        monkeypatch.setitem(checkup.PARTS, name, lambda *_, result=result: result)


@pytest.fixture
def call(tmp_path, capsys):
    """Call the command: (exit status, what it printed, the file that it wrote)."""

    def call(*flags):
        out = tmp_path / "doctor.json"
        status = call_command("doctor.py", doctor.main, f"--out={out}", *flags)
        return status, " ".join(capsys.readouterr().out.split()), json.loads(out.read_text())

    return call


def test_nothing_is_off_on_good_devices(call, monkeypatch):
    _of_two_h100s(monkeypatch, _found())
    status, printed, report = call()
    assert (status, report["advice"], report["failed"]) == (0, [], {})
    assert "Nothing is off." in printed
    assert {*report} == {
        *("schema", "time", "platform", "device_kind", "devices", "config"),
        *("found", "failed", "skipped", "measured", "advice"),
    }
    assert [*report["found"]] == [*checkup.PARTS]
    assert report["measured"]["link"] == 0.95 * H100.link
    assert report["measured"]["attention"] == pytest.approx(kernel_rate(H100, "cudnn", 128).forward * H100.flops)
    assert report["measured"]["kernel"] == "cudnn"


@pytest.mark.parametrize(("fault", "part", "words"), FAULTS, ids=[next(iter(fault)) for fault, _, _ in FAULTS])
def test_each_planted_fault_is_the_one_line_of_advice(fault, part, words):
    (line,) = advise(_found(**fault), {}, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert (line.part, line.wrong) == (part, True)
    assert words in line.words
    assert len(line.words.splitlines()) == 1


def test_slow_link_is_in_the_exit_status_and_in_the_file(call, monkeypatch):
    _of_two_h100s(monkeypatch, _found(along=50e9))
    status, printed, report = call()
    assert status == 1
    assert "off: links: a hop along the ring carries 50 GB/s, h100's link is published at 450; see" in printed
    assert [(line["part"], line["wrong"]) for line in report["advice"]] == [("links", True)]
    assert report["measured"]["link"] == 50e9


def test_unknown_chips_are_shown_and_not_judged():
    lines = advise(_found(forward=1.0, hidden=0.0), {}, platform="gpu", device_kind="NVIDIA B9000")
    assert [(line.part, line.wrong) for line in lines] == [("devices", False)]
    found = _found()
    found["rates"]["rows"].append(found["rates"]["rows"][0] | {"shape": "published"})
    rows = list(rows_of(found, {}, {}, None))
    assert sum("MagiAttention on an H100: 529" in row.beside for row in rows) == 1


def test_failing_part_does_not_end_the_others(call, monkeypatch):
    def broken(*_):
        raise RuntimeError("no [link] is up\nand more")

    _of_two_h100s(monkeypatch, _found())
    monkeypatch.setitem(checkup.PARTS, "rates", broken)
    status, printed, report = call()
    assert status == 1
    assert report["failed"] == {"rates": "RuntimeError: no [link] is up and more"}
    assert [*report["found"]] == [name for name in checkup.PARTS if name != "rates"]
    assert "off: rates: RuntimeError: no [link] is up and more; the other parts" in printed
    assert report["measured"]["attention"] is None


@pytest.mark.usefixtures("plain_kernel")
def test_wrong_kernel_is_found_on_this_machine(call, monkeypatch):
    flags = ("--parts", "kernels", "links", "--devices=1")
    status, printed, report = call(*flags)
    assert (status, report["failed"]) == (0, {}), printed
    assert "note: devices: simulated devices share the cores" in printed
    assert report["skipped"] == {"links": "there is one device, and nobody to send to"}
    assert max(report["found"]["kernels"]["xla"]["ratios"].values()) < 2
    assert "runs on gpu devices" in report["found"]["kernels"]["cudnn"]["refused"]
    good = kernels.KERNELS["xla"]

    def backward(*args):
        dq, dk, dv = good.backward(*args)
        return dq, dk * 1.001, dv

    monkeypatch.setitem(kernels.KERNELS, "xla", good._replace(backward=backward))
    status, printed, report = call(*flags)
    assert status == 1
    assert "off: kernels: impl=xla is wrong here: dk is" in printed
    assert report["advice"][-1]["part"] == "kernels"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens=0"], "--tokens=0: must be positive; give 1 or more"),
        (["--devices=9"], "need 9"),
        (["--parts", "lungs"], "invalid choice: 'lungs'"),
        (["--config=nothing"], "there is no such file"),
    ],
)
def test_mistakes_cost_one_line(flags, words, tmp_path, capsys):
    status = call_command("doctor.py", doctor.main, f"--out={tmp_path / 'doctor.json'}", *flags)
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (2, 1)
    assert words in err
    assert not (tmp_path / "doctor.json").exists()
