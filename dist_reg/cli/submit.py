"""`dist-reg submit RUN.yaml [key=value ...]`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from dist_reg.config import load_run
from dist_reg.errors import UserError
from dist_reg.launch.check import check_run
from dist_reg.launch.job import Job
from dist_reg.launch.submission import indices, next_folder, queue, script, submissions, submit
from dist_reg.launch.sweep import Member, read_members
from dist_reg.rundir import RunDirectory


@click.command("submit")
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--nodes", type=int, default=1, help="Nodes of a run.  [1]")
@click.option(
    "--gpus-per-node", type=int, default=0, help="GPUs of a node, a process each; 0 for a CPU cluster.  [0]"
)
@click.option("--cpus-per-task", type=int, help="CPU cores of a node, shared by its processes.")
@click.option("--processes-per-node", type=int, help="Processes of a node without GPUs.  [1]")
@click.option("--time", help="Time limit, such as 2:00:00 or 1-12.")
@click.option("--partition", help="Partition of the cluster.")
@click.option("--account", help="Account that pays.")
@click.option(
    "--container", metavar="IMAGE", help="Image with dist-reg: for pyxis, or a .sif file for apptainer."
)
@click.option(
    "--mount", "mounts", metavar="DIR", multiple=True, help="Folder that the container sees; repeatable."
)
@click.option("--python", help="Interpreter of the nodes.  [this one; python3 in a container]")
@click.option(
    "--grace", type=int, default=180, help="Seconds before the time limit at which a run saves.  [180]"
)
@click.option(
    "--array",
    "sweep",
    metavar="SWEEP.yaml",
    type=click.Path(path_type=Path),
    help="Keys with lists of values; a run for every combination.",
)
@click.option("--at-once", type=int, help="Runs of an array that SLURM starts at a time.")
@click.option(
    "--sbatch",
    "options",
    metavar="OPTION",
    multiple=True,
    help="Further option of sbatch, such as --qos=long; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Print the batch script and submit nothing.")
def command(
    run_file: Path,
    overrides: tuple[str, ...],
    sweep: Path | None,
    at_once: int | None,
    dry_run: bool,
    python: str | None,
    container: str | None,
    **resources,
) -> None:
    """Check what RUN.yaml describes and submit it to SLURM, alone or as the array of a sweep.

    The job saves before its time limit, requeues itself and goes on. Submitting again fills in what is missing: runs that
    are finished, queued or running are left out.
    """
    python = python or ("python3" if container else sys.executable)
    job = Job(python=python, container=container, **resources)
    if at_once is not None and (sweep is None or at_once < 1):
        raise UserError(
            "--at-once is the number of an array's runs, at least 1; give it with --array SWEEP.yaml."
        )
    single = load_run(run_file, overrides)
    root = single.output_dir
    members = [Member(root.name, single)] if sweep is None else read_members(run_file, overrides, sweep)
    for member in members:
        try:
            check_run(member.run, job)
        except UserError as error:
            raise error if sweep is None else UserError(f"{sweep}: {member.name}: {error}") from None
    missing = left_to_do(members, root)
    if not missing:
        click.echo(f"nothing is missing; dist-reg status {shlex.quote(str(root))}")
        return
    array = None if sweep is None else indices(len(missing), at_once)
    if dry_run:
        click.echo(script(job, missing, root, next_folder(root), array=array), nl=False)
        return
    check_with_torch(missing)
    runs = submit(job, missing, root, array=array)
    job_id = runs[0].job.partition("_")[0]
    what = f"{job.nodes} x {job.processes // job.nodes} processes"
    if array is not None:
        what = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, each {what}"
    click.echo(f"job {job_id}: {what}")
    click.echo(f"log {runs[0].log}" + (" and so on" if len(runs) > 1 else ""))
    click.echo(f"dist-reg status {shlex.quote(str(root))}  shows how far it is")


def left_to_do(members: list[Member], root: Path) -> list[Member]:
    """Those of `members` that are not finished, and not in SLURM's queue; says how many are."""
    unfinished = [member for member in members if RunDirectory(member.run.output_dir).results() is None]
    submitted = submissions(root) if root.is_dir() else []
    waiting = queue(run.job for run in submitted)
    busy = {run.folder: run.job for run in submitted if run.job in waiting}
    missing = [member for member in unfinished if member.run.output_dir.absolute() not in busy]
    finished, queued = len(members) - len(unfinished), len(unfinished) - len(missing)
    if finished or queued:
        click.echo(f"{finished} finished, {queued} queued or running, {len(missing)} to submit", err=True)
    return missing


def check_with_torch(members: list[Member]) -> None:
    """What needs Transformers and DeepSpeed themselves: types of `train`, values of the DeepSpeed configuration."""
    from dist_reg.runtime import prepare_process

    before = dict(os.environ)
    try:
        prepare_process(deepspeed=False)
        from dist_reg.training_args import check_settings

        for member in members:
            check_settings(member.run)
    finally:
        os.environ.clear()  # a job inherits it, and its nodes may have the GPU that this one lacks
        os.environ.update(before)
