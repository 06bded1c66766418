"""Batch scripts: their text, what a shell makes of hostile names, and what sbatch would refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_reg.errors import UserError
from dist_reg.launch.job import BODY, Job, render, seconds_of, template_text

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
REFRESH = "DIST_REG_REFRESH_GOLDEN"
HOSTILE = "a b$(touch pwned)'q\"r;#x %j `touch pwned2` &|*? é"

FOLDER = Path("/data/runs/sst2/slurm/1")
JOBS = {
    "gpus": (Job(nodes=4, gpus_per_node=8, time="12:00:00", partition="gpu", account="nlp-01"), None),
    "cpu": (Job(nodes=2, cpus_per_task=32, processes_per_node=4, grace=60, options=("--exclusive", "--qos=long")), None),
    "array": (Job(gpus_per_node=1, time="1-00:00:00", python="/opt/env/bin/python"), "0-14%4"),
    "pyxis": (Job(nodes=2, gpus_per_node=8, container="nvcr.io/nvidia/pytorch:26.09-py3"), None),
    "apptainer": (Job(gpus_per_node=4, container="/images/dist reg.sif"), None),
}  # fmt: skip


def rendered(name: str) -> str:
    job, array = JOBS[name]
    return render(job, name="sst2", folder=FOLDER, output=Path("/data/runs/sst2"), array=array)


@pytest.mark.parametrize("name", JOBS)
def test_head_of_the_script_is_the_golden_one(name, monkeypatch):
    monkeypatch.chdir("/")
    head, body = rendered(name).split(BODY)
    path = GOLDEN / f"{name}.sbatch"
    if REFRESH in os.environ:
        path.write_text(head)
    assert head == path.read_text(), f"{REFRESH}=1 pytest tests/launch/test_job.py writes {path.name} anew"
    assert template_text().endswith(body)


@pytest.mark.parametrize("name", JOBS)
def test_script_is_bash(name):
    text = rendered(name)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_shipped_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", ROOT / "launch" / script], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(
        ["shellcheck", ROOT / "launch" / script], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def stubs(folder: Path) -> dict[str, str]:
    """An environment in which srun writes its arguments to `arguments`, NUL between them."""
    folder.mkdir()
    programs = {
        "srun": 'printf "%s\\0" "$@" > arguments; pwd > place; env -0 > environment',
        "scontrol": 'if [[ $1 == show ]]; then printf "n0\\nn1\\n"; else echo "NodeName=n0 NodeAddr=10.0.0.1 X=1"; fi',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "71234",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_CPUS_ON_NODE": "16",
    }
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "OMP", "NPROC"))}
    return {**clean, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}


def executed(script: str, folder: Path, **environment: str) -> list[str]:
    """The arguments that srun gets from `script`, run in `folder`."""
    (folder / "script").write_text(script)
    done = subprocess.run(
        ["bash", "script"],
        cwd=folder,
        env={**stubs(folder / "stubs"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return (folder / "arguments").read_text().split("\0")[:-1]


def test_counts_come_from_slurm(tmp_path):
    job = Job(nodes=2, gpus_per_node=8)
    text = render(job, name="run", folder=tmp_path / "slurm" / "1", output=tmp_path, array=None)
    arguments = executed(text, tmp_path, SLURM_GPUS_ON_NODE="8")
    for expected in ("--nodes=2", "--ntasks=2", "--nnodes=2", "--nproc-per-node=8", "--master-addr=10.0.0.1"):
        assert expected in arguments
    assert f"--master-port={10000 + 71234 % 20000}" in arguments
    assert arguments[-4:] == ["-m", "dist_reg", "train", f"{tmp_path}/slurm/1/run.yaml"]
    environment = (tmp_path / "environment").read_text().split("\0")
    assert "OMP_NUM_THREADS=2" in environment
    assert "SRUN_CPUS_PER_TASK=16" in environment
    assert not [line for line in environment if line.startswith(("NCCL_", "GLOO_"))]


def test_a_cpu_cluster_has_one_process_a_node_with_all_threads(tmp_path):
    text = render(Job(nodes=2, cpus_per_task=16), name="run", folder=tmp_path, output=tmp_path, array=None)
    assert "--nproc-per-node=1" in executed(text, tmp_path, SLURM_CPUS_PER_TASK="16")
    assert "OMP_NUM_THREADS=16" in (tmp_path / "environment").read_text().split("\0")


@pytest.mark.parametrize("container", [None, "image.sif", "reg/im:1"])
@pytest.mark.parametrize("array", [None, "0-3"])
def test_no_name_reaches_the_shell_unquoted(tmp_path, monkeypatch, container, array):
    place = tmp_path / HOSTILE
    place.mkdir()
    monkeypatch.chdir(place)
    image = None if container is None else f"{HOSTILE} {container}"
    job = Job(nodes=2, python=f"/opt/{HOSTILE}/python", container=image)
    text = render(job, name=HOSTILE, folder=place / "slurm" / "1", output=place / "out", array=array)
    arguments = executed(text, place, SLURM_ARRAY_TASK_ID="3")
    assert arguments[-1] == str(place / "slurm" / "1" / ("3" if array else "") / "run.yaml")
    assert f"/opt/{HOSTILE}/python" in arguments
    if container == "image.sif":
        assert image in arguments
        assert str(place) in arguments
    elif container:
        assert f"--container-image={image}" in arguments
        assert f"--container-workdir={place}" in arguments
    assert not list(tmp_path.rglob("pwned*"))


def test_line_breaks_in_a_job_name_do_not_end_the_directive(tmp_path):
    text = render(Job(), name="a\n#SBATCH --nodes=99\nrm -rf x", folder=tmp_path, output=tmp_path, array=None)
    assert "--job-name='a-#SBATCH --nodes=99-rm -rf x'" in text
    assert len([line for line in text.splitlines() if line.startswith("#SBATCH --nodes")]) == 1


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\\"])
def test_a_path_that_a_log_cannot_have_is_refused(character):
    with pytest.raises(UserError, match="line break, tab or backslash"):
        render(Job(), name="x", folder=Path(f"/a{character}b"), output=Path("/a"), array=None)


def test_percent_signs_of_a_path_are_not_patterns():
    text = render(Job(), name="x", folder=Path("/a/50%j/slurm/1"), output=Path("/a"), array=None)
    assert "--output=/a/50%%j/slurm/1/%j.log" in text


@pytest.mark.parametrize("mount", ["a,b", "a:b"])
def test_mounts_that_a_container_cannot_have_are_refused(tmp_path, mount):
    folder = tmp_path / mount
    folder.mkdir()
    with pytest.raises(UserError, match="comma or a colon"):
        render(
            Job(container="x", mounts=(str(folder),)), name="x", folder=tmp_path, output=tmp_path, array=None
        )


TIMES = {"30": 1800, "90:30": 5430, "2:00:00": 7200, "1-12": 129600, "1-0:30": 88200, "0-00:10:05": 605}


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_times_of_slurm(text, seconds):
    assert seconds_of(text) == seconds


MISTAKES = {
    "nodes": ({"nodes": 0}, "--nodes must be at least 1; it is 0"),
    "gpus": ({"gpus_per_node": -1}, "--gpus-per-node must be at least 0"),
    "time": ({"time": "2h"}, "--time '2h' is not a time of SLURM's; give minutes, H:MM:SS"),
    "time in words": ({"time": "1:2:3:4"}, "is not a time"),
    "time with a line break": ({"time": "10\n"}, "is not a time"),
    "short": ({"time": "2"}, "--time 2 is 120 seconds, and the run saves 180 seconds before its end"),
    "partition": ({"partition": "gpu; rm"}, "--partition 'gpu; rm' is no name"),
    "account": ({"account": "a\nb"}, "--account 'a\\nb' is no name"),
    "both": ({"gpus_per_node": 2, "processes_per_node": 4}, "each GPU has one process"),
    "option": ({"options": ("qos=long",)}, "is not of the form --NAME=VALUE"),
    "option with a line break": ({"options": ("--qos=a\nb",)}, "is not of the form"),
    "own option": ({"options": ("--nodes=3",)}, "--sbatch --nodes=3: dist-reg submit sets --nodes itself"),
    "mount": ({"mounts": ("/nowhere at all",)}, "--mount /nowhere at all is not a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_sentences(name):
    options, expected = MISTAKES[name]
    with pytest.raises(UserError) as raised:
        Job(**options)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
