"""The scripts and manifests for clusters, with small programs in the place of the clusters' own."""

import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ring_attention.hardware.chips import CHIPS, GPU_MEMORY_FRACTION
from ring_attention.training.fault_tolerance import errors
from ring_attention.training.flags import parse_config

REPOSITORY = Path(__file__).parents[2]
CLUSTERS = REPOSITORY / "scripts" / "clusters"
MANIFESTS = {name: CLUSTERS / f"gke_jobset_{name}.yaml" for name in ("gpu", "tpu")}


def stand_in(folder, name, body):
    """A program that notes down how it was called, one line a call, before it does `body`."""
    path = folder / name
    note = f'{{ printf "%q " "$@"; echo; }} >>{folder}/{name}.calls'
    path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
    path.chmod(0o755)


def calls(folder, name):
    path = folder / f"{name}.calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(script, folder, *words, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env = clean | {"PATH": f"{folder}:{os.environ['PATH']}"} | {name: str(value) for name, value in environment.items()}
    command = ["bash", CLUSTERS / script, *words]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", sorted(CLUSTERS.glob("*.sh")), ids=lambda path: path.name)
def test_bash_can_read_every_script(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    assert os.access(script, os.X_OK)


# What srun returns is the highest status of any process, 128 + N for one that signal N ended.
@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        (0, 0, False),
        (1, 0, True),
        (1, 50, False),
        (2, 0, False),
        (130, 0, False),
        (143, 0, True),
        (143, 5000, True),
        (137, 0, True),  # killed, or its node had no memory left for it
        (139, 49, True),
        (137, 50, False),
        (253, 0, False),
    ],
)
def test_slurm_queues_again_when_that_helps(tmp_path, status, restarts, requeued):
    stand_in(tmp_path, "srun", f"exit {status}")
    stand_in(tmp_path, "scontrol", "")
    slurm = {"SLURM_SUBMIT_DIR": tmp_path, "SLURM_JOB_ID": 7, "SLURM_RESTART_COUNT": restarts}
    done = run("slurm.sh", tmp_path, "--config=a b.py", **slurm)
    assert calls(tmp_path, "srun")[0][-3:] == ["python", "train.py", "--config=a b.py"]
    assert calls(tmp_path, "scontrol") == ([["requeue", "7"]] if requeued else [])
    assert done.returncode == (0 if requeued else status), done.stderr


def test_slurm_gives_others_long_enough_to_stop(tmp_path):
    stand_in(tmp_path, "srun", "")
    run("slurm.sh", tmp_path, SLURM_SUBMIT_DIR=tmp_path)
    (call,) = calls(tmp_path, "srun")
    assert "--kill-on-bad-exit=0" in call
    (wait,) = [int(word.removeprefix("--wait=")) for word in call if word.startswith("--wait=")]
    assert wait > 60
    (notice,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", (CLUSTERS / "slurm.sh").read_text(), re.MULTILINE)
    assert int(notice) > 30


@pytest.mark.parametrize(("tasks", "ids"), [(1, "0,1,2,3"), (4, "unset")])
def test_slurm_gives_a_lone_process_all_gpus_of_its_node(tmp_path, tasks, ids):
    stand_in(tmp_path, "srun", "echo ids=${JAX_LOCAL_DEVICE_IDS-unset} proxy=${https_proxy-unset}")
    slurm = {"SLURM_SUBMIT_DIR": tmp_path, "SLURM_NTASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": 4}
    assert run("slurm.sh", tmp_path, **slurm, https_proxy="http://x").stdout == f"ids={ids} proxy=unset\n"


def manifest(name):
    """A manifest's JobSet, its one Job and that one's container."""
    jobset = yaml.safe_load(MANIFESTS[name].read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return jobset, replicated, container


def what_kubernetes_does(name, *, exit_code=None, condition=None):
    """Walk through the rules as Job and JobSet do after a pod has failed: the action, and whether it is counted."""
    jobset, replicated, _ = manifest(name)
    job = replicated["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes = rule.get("onExitCodes", {"values": []})
        if exit_code in codes["values"]:
            pod = f"Container {codes['containerName']} for pod default/p-0 failed with exit code {exit_code}"
            reason, message = "PodFailurePolicy", f"{pod} matching FailJob rule at index {index}"
            break
        if condition in [pattern["type"] for pattern in rule.get("onPodConditions", [])]:
            pod = f"Pod default/p-0 has condition {condition}"
            reason, message = "PodFailurePolicy", f"{pod} matching FailJob rule at index {index}"
            break
    assert job["backoffLimit"] == 0
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"  # the default, counted


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_restarts_the_preempted_without_end(name):
    assert what_kubernetes_does(name, exit_code=2) == "FailJobSet"
    assert what_kubernetes_does(name, exit_code=1) == "RestartJobSet"
    assert what_kubernetes_does(name, exit_code=137) == "RestartJobSet"
    assert what_kubernetes_does(name, exit_code=143) == "RestartJobSetAndIgnoreMaxRestarts"
    assert what_kubernetes_does(name, condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert manifest(name)[0]["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_agree_with_themselves_and_with_jobs_rules(name):
    jobset, replicated, container = manifest(name)
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert job["completions"] == job["parallelism"]
    assert (job["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")  # podFailurePolicy needs the latter
    assert pod["terminationGracePeriodSeconds"] > 30
    named = [rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert named == [container["name"]]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    (run_dir,) = [word for word in container["args"] if word.startswith("--config.run_dir=")]
    assert run_dir.startswith(f"--config.run_dir={mounts['shared']}/")


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_mesh_takes_every_device_of_the_pods(name):
    _, replicated, container = manifest(name)
    (devices,) = [count for kind, count in container["resources"]["limits"].items() if kind.endswith(("/gpu", "/tpu"))]
    config = parse_config([word for word in container["args"] if word.startswith("--config")], "configs/tiny.py")
    mesh = config.mesh
    assert mesh.dp * mesh.fsdp * mesh.sp * mesh.tp == devices * replicated["template"]["spec"]["completions"]


def test_gpu_manifest_says_where_process_0_is():
    jobset, replicated, container = manifest("gpu")
    flags = dict(word.split("=", 1) for word in container["args"])
    host, port = flags["--coordinator_address"].split(":")
    name = jobset["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert {"containerPort": int(port)} in container["ports"]
    assert int(flags["--num_processes"]) == replicated["template"]["spec"]["completions"]
    (variable,) = [entry for entry in container["env"] if f"$({entry['name']})" == flags["--process_id"]]
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_tpu_manifest_has_a_pod_for_each_host():
    _, replicated, container = manifest("tpu")
    job = replicated["template"]["spec"]
    chips = math.prod(map(int, job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips


# Each call of describe, and each look at the service on host 0, gives the next word of a list, its last for ever.
GCLOUD = """
next() { # FILE: its first line, which goes unless it is the last
  head -n 1 "$1"
  if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi
}
case "$*" in
  *queued-resources\\ describe*) word=$(next FOLDER/queued); [ "$word" = ABSENT ] && exit 1; echo "$word" ;;
  *worker=0*SubState*) word=$(next FOLDER/service); [ "$word" = LOST ] && exit 255; echo "$word" ;;
esac
"""
SETTINGS = dict(
    TPU="my-tpu", ZONE="z", ACCELERATOR="v5litepod-16", RUNTIME="r", IMAGE="host/image", SHARE="10.0.0.2:/s", POLL=0
)


def cloud_tpu(folder, queued, service, *words, **environment):
    (folder / "queued").write_text("\n".join(queued) + "\n")
    (folder / "service").write_text("\n".join(service) + "\n")
    stand_in(folder, "gcloud", GCLOUD.replace("FOLDER", str(folder)))
    done = run("cloud_tpu.sh", folder, *words, **(SETTINGS | environment))
    return done, calls(folder, "gcloud")


def verbs(called):
    """create, delete, start (train.py on all hosts) and journal, in order."""
    names = {"create": "create", "delete": "delete"}
    found = []
    for call in called:
        if call[:3] == ["compute", "tpus", "queued-resources"]:
            found.append(names.get(call[3]))
        elif "systemd-run" in call[-1]:
            assert "--worker=all" in call
            found.append("start")
        elif "journalctl" in call[-1]:
            found.append("journal")
    return [name for name in found if name]


def test_cloud_tpu_starts_a_run_and_gives_its_slice_back(tmp_path):
    queued = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    done, called = cloud_tpu(tmp_path, queued, ["running", "running", "exited"])
    assert done.returncode == 0, done.stderr
    assert verbs(called) == ["create", "start", "delete"]
    (create,) = [call for call in called if "create" in call]
    assert {"my-tpu", "--node-id=my-tpu", "--zone=z", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)


def test_cloud_tpu_gives_a_preempted_run_another_slice(tmp_path):
    queued = ["ABSENT", "ACTIVE", "SUSPENDING", "SUSPENDED", "ABSENT", "ACTIVE"]
    done, called = cloud_tpu(tmp_path, queued, ["running", "LOST", "running", "exited"], CREATE_FLAGS="")
    assert done.returncode == 0, done.stderr
    assert verbs(called) == ["create", "start", "delete", "create", "start", "delete"]
    assert not any("--spot" in call for call in called)


@pytest.mark.parametrize("state", ["dead", "auto-restart"])
def test_cloud_tpu_starts_the_service_again_on_a_host(tmp_path, state):
    done, called = cloud_tpu(tmp_path, ["ACTIVE"], ["running", state, "running", "exited"])
    assert done.returncode == 0, done.stderr
    assert verbs(called) == ["start", "start", "delete"]


def test_cloud_tpu_keeps_the_slice_of_a_failure(tmp_path):
    done, called = cloud_tpu(tmp_path, ["ACTIVE"], ["running", "failed"])
    assert done.returncode == 1
    assert verbs(called) == ["start", "journal"]
    assert "gcloud compute tpus queued-resources delete my-tpu --zone=z --force" in done.stderr


def test_cloud_tpu_runs_the_words_that_it_was_given(tmp_path):
    words = ["--config=a b.py", "--config.data.paths=/shared/*.txt", "--config.name=it's $HOME"]
    _, called = cloud_tpu(tmp_path, ["ACTIVE"], ["exited"], *words)
    (command,) = [call[-1].removeprefix("--command=") for call in called if "systemd-run" in call[-1]]
    host = tmp_path / "host"
    host.mkdir()
    for name in ("sudo", "mountpoint"):
        stand_in(host, name, "")
    stand_in(host, "systemctl", "echo dead")
    env = os.environ | {"PATH": f"{host}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], env=env, check=True, timeout=60)
    login, service = calls(host, "sudo")
    assert login == ["gcloud", "auth", "configure-docker", "host", "--quiet"]
    assert service[0] == "systemd-run"
    assert "--property=ExecStartPre=-/usr/bin/docker rm --force train" in service
    assert service[service.index("docker") :][-6:] == ["host/image", "python", "train.py", *words]
    assert "--property=RestartPreventExitStatus=2" in service
    # Where it runs already nothing is started a second time.
    stand_in(host, "systemctl", "echo running")
    subprocess.run(["bash", "-c", command], env=env, check=True, timeout=60)
    assert len(calls(host, "sudo")) == 2


def test_cloud_tpu_says_which_variable_is_missing(tmp_path):
    done, called = cloud_tpu(tmp_path, ["ACTIVE"], ["exited"], IMAGE="")
    assert done.returncode != 0
    assert "IMAGE" in done.stderr
    assert not called


DOCS = (REPOSITORY / "docs" / "pods.md").read_text()


def test_the_docs_list_every_exit_status_of_train_py():
    listed = [int(status) for status in re.findall(r"^\| (\d+) \| .* \| .* \|$", DOCS, re.MULTILINE)]
    assert listed == sorted([errors.FINISHED, errors.FAILED, errors.MISTAKE, errors.INTERRUPTED, errors.PREEMPTED])


def test_every_file_that_the_docs_name_is_there():
    named = re.findall(r"(?:scripts|tests|configs)/[\w./]+\w", DOCS) + re.findall(r"\]\((\w+\.md)\)", DOCS)
    missing = [name for name in named if not (REPOSITORY / name).exists() and not (REPOSITORY / "docs" / name).exists()]
    assert not missing
    assert len(set(named)) > 8


@pytest.mark.parametrize("name", ["slurm.sh", "gke_jobset_gpu.yaml"])
def test_gpu_jobs_take_the_memory_that_the_planner_counts_on(name):
    text = (CLUSTERS / name).read_text()
    found = re.findall(r"XLA_PYTHON_CLIENT_MEM_FRACTION(?::-| #.*\n +value: \")([\d.]+)", text)
    assert [float(number) for number in found] == [GPU_MEMORY_FRACTION]
    assert f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MEMORY_FRACTION:g}" in CHIPS["h100"].sources["memory"]
