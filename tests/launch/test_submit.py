"""`dist-reg submit` and `dist-reg status` with an sbatch that only takes notes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dist_reg.config import read_yaml, write_yaml
from tests.cli.test_cli import IMPORTED, call, words
from tests.distributed.launch import run

RUN = {
    "model": "minilm",
    "task": "demo",
    "methods": [{"hype": {"sigma": 1e-4}}],
    "batch_size": 16,
    "train": {"max_steps": 10},
    "deepspeed": "zero3",
}
SWEEP = {"methods": [[], ["hype"]], "train.seed": [0, 1]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a run file and a sweep, and a SLURM on PATH that keeps what it is given."""
    place = tmp_path / "my runs"
    place.mkdir()
    write_yaml(RUN, place / "run.yaml")
    write_yaml(SWEEP, place / "sweep.yaml")
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(
        programs / "sbatch", 'printf "%s\\0" "$@" >> submitted; echo 4$(tr -dc "\\0" < submitted | wc -c)'
    )
    write_program(programs / "squeue", "cat queue 2>/dev/null")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(place)
    return place


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def finish(run_folder: Path, submitted: str) -> None:
    """Leave in `run_folder` what its job does, which trained the run file that was submitted as `submitted`."""
    run_folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run_folder.parent / "slurm" / submitted / "run.yaml", run_folder)
    (run_folder / "results.json").write_text(json.dumps({"metrics": {}}))


def test_a_run_is_frozen_submitted_and_named(folder):
    code, out, err = call(
        "submit", "run.yaml", "train.seed=3", "--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00"
    )
    assert code == 0, err
    place = folder / "runs" / "run" / "slurm" / "1"
    assert out.splitlines()[0] == "job 42: 2 x 4 processes"
    assert out.splitlines()[1] == f"log {place / '42.log'}"
    assert (folder / "submitted").read_text().split("\0")[:2] == ["--parsable", str(place / "job.sbatch")]
    frozen = read_yaml(place / "run.yaml")
    assert frozen["train"]["seed"] == 3
    assert frozen["methods"][0]["hype"]["sigma"] == 1e-4
    text = (place / "job.sbatch").read_text()
    for line in ("--nodes=2", "--gpus-per-node=4", "--time=1:00:00", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}\n" in text
    assert json.loads((place / "submission.json").read_text())["job"] == "42"


def test_the_frozen_run_file_trains_in_the_folder_it_was_submitted_from(folder):
    from dist_reg.config import load_run
    from dist_reg.rundir import RunDirectory

    assert call("submit", "run.yaml")[0] == 0
    frozen = load_run(folder / "runs" / "run" / "slurm" / "1" / "run.yaml")
    RunDirectory(frozen.output_dir).check(frozen)  # the submission beside it is no other run
    assert frozen.as_dict() == load_run(folder / "run.yaml").as_dict()


def test_dry_run_prints_the_script_and_touches_nothing(folder):
    before = sorted(folder.rglob("*"))
    code, out, err = call("submit", "run.yaml", "--nodes", "2", "--gpus-per-node", "8", "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=run\n#SBATCH --nodes=2\n")
    assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("sweep", [[], ["--array", "sweep.yaml"]])
def test_dry_run_does_not_wait_for_torch(folder, sweep):
    done = run(["-c", IMPORTED, "submit", "run.yaml", "--dry-run", *sweep], timeout=120)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    for heavy in ("torch", "transformers", "numpy", "deepspeed", "datasets", "rich.table"):
        assert heavy not in modules


def test_an_array_has_a_run_file_a_combination(folder):
    code, out, err = call(
        "submit", "run.yaml", "train.output_dir=out put", "--array", "sweep.yaml", "--at-once", "3"
    )
    assert code == 0, err
    assert out.splitlines()[0] == "job 42: 4 runs, each 1 x 1 processes"
    place = folder / "out put" / "slurm" / "1"
    assert "#SBATCH --array=0-3%3\n" in (place / "job.sbatch").read_text()
    names = ["plain_seed-0", "plain_seed-1", "hype_seed-0", "hype_seed-1"]
    for index, name in enumerate(names):
        assert read_yaml(place / str(index) / "run.yaml")["train"]["output_dir"] == f"out put/{name}"


def test_submitting_again_fills_in_what_is_missing(folder):
    array = ("submit", "run.yaml", "--array", "sweep.yaml")
    root = folder / "runs" / "run"
    assert call(*array)[0] == 0
    finish(root / "plain_seed-1", "1/1")
    (folder / "queue").write_text("42_0|RUNNING\n42_3|PENDING\n99|RUNNING\n")
    code, out, err = call(*array)
    assert code == 0
    assert "1 finished, 2 queued or running, 1 to submit" in err
    assert out.splitlines()[0] == "job 44: 1 run, each 1 x 1 processes"
    assert read_yaml(root / "slurm" / "2" / "0" / "run.yaml")["train"]["output_dir"] == "runs/run/hype_seed-0"
    for name, index in (("plain_seed-0", 0), ("hype_seed-0", 2), ("hype_seed-1", 3)):
        finish(root / name, f"1/{index}")
    code, out, err = call(*array)
    assert (code, out) == (0, f"nothing is missing; dist-reg status {shlex.quote('runs/run')}\n")
    assert not (root / "slurm" / "3").exists()


def test_a_single_run_is_not_submitted_twice(folder):
    assert call("submit", "run.yaml")[0] == 0
    (folder / "queue").write_text("42|PENDING\n")
    code, out, err = call("submit", "run.yaml")
    assert code == 0
    assert "0 finished, 1 queued or running, 0 to submit" in err
    assert out.startswith("nothing is missing")
    (folder / "queue").write_text("")
    assert call("submit", "run.yaml")[1].startswith("job 44: ")


def test_what_slurm_refuses_is_said_and_leaves_nothing(folder, tmp_path):
    write_program(
        tmp_path / "bin" / "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1"
    )
    code, out, err = call("submit", "run.yaml", "--partition", "gpu")
    assert (code, out) == (2, "")
    assert "error: SLURM refused the job: sbatch: error: invalid partition specified: gpu" in err
    assert not (folder / "runs").exists()


def test_a_job_does_not_inherit_what_this_node_lacks(folder, tmp_path):
    write_program(tmp_path / "bin" / "sbatch", "env > seen; echo 42")
    assert call("submit", "run.yaml")[0] == 0
    names = {line.partition("=")[0] for line in (folder / "seen").read_text().splitlines()}
    assert not names & {"DS_ACCELERATOR", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def test_without_sbatch(folder, tmp_path, monkeypatch):
    (tmp_path / "bin" / "sbatch").unlink()
    monkeypatch.setattr("subprocess.run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    code, _, err = call("submit", "run.yaml")
    assert code == 2
    assert "sbatch is not on PATH" in err
    assert not (folder / "runs").exists()


MISTAKES = {
    "no run file": (["nowhere.yaml"], "run file nowhere.yaml does not exist"),
    "batch": (["run.yaml", "--nodes", "3"], "batch_size 16 is not processes (3) x micro-batch (free)"),
    "batch of an array": (
        ["run.yaml", "--gpus-per-node", "5", "--array", "sweep.yaml"], "sweep.yaml: plain_seed-0: batch_size 16 is not",
    ),
    "method": (["run.yaml", "methods=[hyppe]"], "unknown method 'hyppe'; did you mean 'hype'?"),
    "option of a method": (["run.yaml", "methods.hype.sigmma=1"], "did you mean 'sigma'?"),
    "field of train": (["run.yaml", "train.learning_rat=1"], "did you mean 'learning_rate'?"),
    "value of train": (["run.yaml", "train.learning_rate=fast"], "train.learning_rate"),
    "deepspeed": (["run.yaml", "deepspeed=zero5"], "unknown configuration 'zero5'"),
    "optimizer": (["run.yaml", "train.optim=adafactor"], "ZeRO-3 cannot shard 'adafactor'"),
    "time": (["run.yaml", "--time", "soon"], "--time 'soon' is not a time"),
    "sweep": (["run.yaml", "--array", "swep.yaml"], "did you mean 'sweep.yaml'?"),
    "at once without an array": (["run.yaml", "--at-once", "2"], "give it with --array"),
    "option": (["run.yaml", "--gpus", "2"], "--gpus"),
    "number": (["run.yaml", "--nodes", "two"], "--nodes"),
    "line break": (["run.yaml", 'train.output_dir="a\\nb"'], "line break"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_and_nothing_is_submitted(folder, name):
    arguments, expected = MISTAKES[name]
    before = sorted(folder.rglob("*"))
    code, out, err = call("submit", *arguments)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


def test_a_deepspeed_file_is_checked_without_deepspeed(folder):
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_com": True}}))
    code, _, err = call("submit", "run.yaml", "deepspeed=ds.json", "--dry-run")
    assert code == 2
    assert "zero_optimization.overlap_com is unknown; did you mean 'overlap_comm'?" in err
    (folder / "ds.json").write_text(json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 2}}))
    code, _, err = call("submit", "run.yaml", "deepspeed=ds.json", "--dry-run")
    assert code == 2
    assert "says train_batch_size 64 and the run batch_size 16" in err


def test_a_folder_of_another_run_is_refused(folder):
    other = folder / "runs" / "run"
    other.mkdir(parents=True)
    (other / "mine.txt").write_text("mine")
    code, _, err = call("submit", "run.yaml")
    assert code == 2
    assert "holds files but no run.yaml" in err
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_status_of_every_kind(folder):
    assert call("submit", "run.yaml", "--array", "sweep.yaml")[0] == 0
    root = folder / "runs" / "run"
    finish(root / "plain_seed-0", "1/0")
    (folder / "queue").write_text("42_1|PENDING\n")
    records = root / "slurm" / "1" / "2" / "records"
    records.mkdir()
    (records / "failure-1-1.000-rank0-exit1").write_text(
        "rank 0 on n0: RuntimeError: connection closed by peer\n"
    )
    (records / "failure-0-2.000-rank3-exit1").write_text("rank 3 on n1: killed by SIGKILL\n  more\n")
    run_folder = root / "hype_seed-0"
    run_folder.mkdir()
    progress = {
        "step": 7,
        "max_steps": 10,
        "loss": 0.51234,
        "examples_per_second": 33.0,
        "seconds_per_step": 0.5,
    }
    (run_folder / "progress.json").write_text(json.dumps({**progress, "time": time.time() - 300}))
    code, out, err = call("status", "runs/run")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["plain_seed-0"] == ["finished", "42_0"]
    assert rows["plain_seed-1"] == ["queued", "42_1"]
    assert rows["hype_seed-0"] == ["failed", "42_2", "7/10", "0.5123", "33", "0.5", "5", "min", "ago"]
    assert rows["hype_seed-1"] == ["new", "42_3"]
    assert "1 failed, 1 finished, 1 new, 1 queued" in out
    assert "hype_seed-0: rank 3 on n1: killed by SIGKILL\n" in out
    assert f"log {root / 'slurm' / '1' / '42_2.log'}" in out


def test_status_where_there_is_nothing(folder):
    assert call("status", "nowhere")[2] == "error: status: folder nowhere does not exist.\n"
    code, _, err = call("status", ".")
    assert code == 2
    assert "no run in or below" in words(err)
