"""Submissions: `slurm/N/` in a run directory, or in the folder of a sweep's runs, N counting from 1.

job.sbatch        the batch script
run.yaml          the run as it was when it was submitted; for an array INDEX/run.yaml
submission.json   job id, time and runs; written when SLURM has taken the job
JOB.log           what the job prints; for an array JOB_INDEX.log
records/          why a job ended early (dist_reg.launch.agent); for an array INDEX/records
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_reg.config import write_yaml
from dist_reg.errors import UserError, reason
from dist_reg.launch.job import Job, render
from dist_reg.launch.sweep import Member
from dist_reg.rundir import SUBMISSIONS, plain

RECORD = "submission.json"


@dataclass(frozen=True)
class Submitted:
    """One run of a job that SLURM has taken."""

    job: str
    """The job's id; of an array's run with its index, as 12_3."""
    folder: Path
    """The run directory."""
    log: Path
    records: Path
    time: float

    @property
    def failure(self) -> str | None:
        """What the job says of why it failed, if it did and could."""
        return next(
            (path.read_text(encoding="utf-8") for path in sorted(self.records.glob("failure-*"))), None
        )

    @property
    def stopped(self) -> bool:
        """Whether the last start of the job stopped on request, saved."""
        return (self.records / "stopped").exists()


def next_folder(root: Path) -> Path:
    """The folder of the next submission below `root`, absolute; not created."""
    taken = [int(path.name) for path in (root / SUBMISSIONS).glob("*") if path.name.isdecimal()]
    return root.absolute() / SUBMISSIONS / str(max(taken, default=0) + 1)


def script(job: Job, members: Sequence[Member], root: Path, folder: Path, *, array: str | None) -> str:
    """The batch script of `members` below `root`, to be submitted from `folder`."""
    name = root.name or "dist-reg"
    return render(job, name=name, folder=folder, output=root.absolute(), array=array)


def indices(count: int, at_once: int | None) -> str:
    """The array of `count` runs, of which SLURM starts `at_once` at a time."""
    return f"0-{count - 1}" + (f"%{at_once}" if at_once else "")


def submit(job: Job, members: Sequence[Member], root: Path, *, array: str | None) -> list[Submitted]:
    """Write the next submission of `members` below `root` and hand it to SLURM. Raises UserError with what sbatch says."""
    folder = next_folder(root)
    text = script(job, members, root, folder, array=array)
    created = [path for path in folder.parents if not path.exists()]
    try:
        folder.mkdir(parents=True)
        for index, member in enumerate(members):
            place = folder / str(index) if array else folder
            place.mkdir(exist_ok=True)
            write_yaml(plain(member.run.as_dict()), place / "run.yaml")
        (folder / "job.sbatch").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"train.output_dir: {folder} cannot be written: {reason(error)}.") from None
    try:
        job_id = sbatch(folder / "job.sbatch")
    except UserError:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # not empty: somebody else's by now
            for path in created:
                path.rmdir()
        raise
    record = {
        "job": job_id,
        "time": time.time(),
        "nodes": job.nodes,
        "processes": job.processes,
        "array": array is not None,
        "runs": [os.path.relpath(member.run.output_dir.absolute(), folder) for member in members],
    }
    partial = folder / f".{RECORD}"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / RECORD)
    return runs_of(folder, record)


def sbatch(path: Path) -> str:
    """Submit the script at `path` and return the job's id."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True, timeout=120, check=False
        )
    except FileNotFoundError:
        raise UserError(
            "sbatch is not on PATH; submit from a login node of the cluster, or use --dry-run."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            "sbatch did not answer within two minutes; dist-reg status and squeue say what it took."
        ) from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"SLURM refused the job: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


def runs_of(folder: Path, record: dict[str, Any]) -> list[Submitted]:
    """The runs of the submission in `folder`."""
    runs = []
    for index, path in enumerate(record["runs"]):
        job = f"{record['job']}_{index}" if record["array"] else record["job"]
        place = folder / str(index) if record["array"] else folder
        run = Path(os.path.normpath(folder / path))
        runs.append(Submitted(job, run, folder / f"{job}.log", place / "records", record["time"]))
    return runs


def submissions(root: Path) -> list[Submitted]:
    """Every run that was submitted from `root` or a folder below it, oldest first."""
    found: list[Submitted] = []
    for path in root.glob(f"**/{SUBMISSIONS}/*/{RECORD}"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found += runs_of(path.parent.absolute(), record)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not one of ours
    return sorted(found, key=lambda run: run.time)


def queue(jobs: Iterable[str]) -> dict[str, str]:
    """State of each of `jobs` that SLURM still has in its queue; empty where there is no SLURM."""
    wanted = set(jobs)
    if not wanted or shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return {}
    states = dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    return {job: state for job, state in states.items() if job in wanted}
