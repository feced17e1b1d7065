"""Plans at the rates that the doctor measured."""

import json

import pytest
from command_lines import call_command

from ring_attention.checks import ConfigError
from ring_attention.commands import plan
from ring_attention.configs import gpu_8xh100_7b
from ring_attention.hardware.topology import find_topology
from ring_attention.planning.measured import with_measured
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import step_time

H100 = find_topology("h100:1x8")
RATES = dict(kernel="cudnn", matmul=5e14, attention=4e14, attention_backward=3e14, link=2e11)


def _report(tmp_path, **changes):
    path = tmp_path / "doctor.json"
    report = dict(schema=2, device_kind="NVIDIA H100 80GB HBM3", measured=RATES) | changes
    path.write_text(json.dumps(report))
    return path


def _step(topology):
    share = Share.of(gpu_8xh100_7b.get_config(), topology)
    return step_time(share, share.strategy)


def _measured(tmp_path, **rates):
    return _step(with_measured(H100, _report(tmp_path, measured=RATES | rates)))


def test_measured_rates_change_the_times_that_they_are_of(tmp_path):
    published, measured = _step(H100), _measured(tmp_path)
    assert measured.attention / published.attention == pytest.approx(
        (1 / 4e14 + 2.5 / 3e14) / (1 / (0.63 * 989.4e12) + 2.5 / (0.55 * 989.4e12)), rel=0.03
    )
    assert measured.dense / published.dense == pytest.approx(0.7 * 989.4e12 / 5e14)
    assert _measured(tmp_path, attention=8e14).kinds[0].forward.compute < measured.kinds[0].forward.compute
    assert _measured(tmp_path, link=2e9).attention_waits > 10 * measured.attention_waits
    assert _measured(tmp_path, link=None).attention_waits == pytest.approx(
        _measured(tmp_path, link=0.8 * 450e9).attention_waits
    )
    assert _measured(tmp_path, matmul=None).dense == published.dense


def test_plan_says_where_its_rates_are_from(tmp_path, capsys):
    flags = ["--config=gpu_8xh100_7b", "--topology=h100:1x8", f"--measured={_report(tmp_path)}"]
    assert call_command("plan.py", plan.main, *flags, f"--out={tmp_path / 'plan'}") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "measured by doctor.json, attention with cudnn" in printed
    assert "200 GB/s a link one way │ measured by doctor.json" in printed
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert written["attention_rate"]["forward"] == pytest.approx(4e14 / 989.4e12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(device_kind="TPU v5 lite"),
            "was measured on 'TPU v5 lite', but h100:1x8 has h100 (NVIDIA H100 80GB HBM3); plan",
        ),
        (dict(device_kind="cpu"), "was measured on 'cpu', but h100:1x8 has h100"),
        (dict(device_kind=None), "was measured on None"),
        (dict(schema=1), "has schema 1, need 2; run ring-attention doctor again"),
        (dict(measured=None), "is no report of the doctor; give the doctor.json that it wrote"),
        (dict(measured={}), "has no rates of attention; see its part rates"),
        (dict(measured=RATES | dict(attention_backward=None)), "has no rates of attention"),
        (dict(measured=RATES | dict(attention="fast")), "measured.attention='fast' is no rate"),
        (dict(measured=RATES | dict(link=-1.0)), "measured.link=-1.0 is no rate"),
        (dict(measured=RATES | dict(matmul=float("nan"))), "measured.matmul=nan is no rate"),
    ],
)
def test_reports_that_do_not_fit_are_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        with_measured(H100, _report(tmp_path, **changes))
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"--measured={tmp_path / 'doctor.json'}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON, or was cut short"),
        ('{"schema": 2, "measu', "cut short"),
        ("[1]", "is no report of the doctor"),
    ],
)
def test_plan_refuses_what_is_no_report(tmp_path, capsys, text, words):
    path = tmp_path / "doctor.json"
    path.write_text(text)
    status = call_command("plan.py", plan.main, "--topology=h100:1x8", f"--measured={path}")
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (2, 1)
    assert words in err


def test_plan_refuses_a_report_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; give a file of ring-attention doctor"):
        with_measured(H100, tmp_path / "none.json")
