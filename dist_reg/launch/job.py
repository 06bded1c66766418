"""A SLURM job: what is asked of the cluster, checked, and the batch script that asks it.

The script is `launch/slurm.sbatch` with its directives and settings filled in. Everything that a user named reaches it
quoted; run files are named by numbers of ours, so that no override is ever part of a script.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from dist_reg.errors import UserError

BODY = "# What follows is the same in every job."
"""The line of `launch/slurm.sbatch` from which on every rendered script is that file."""
OWN = (
    "array", "chdir", "cpus-per-task", "error", "gpus-per-node", "job-name", "nodes", "ntasks", "ntasks-per-node",
    "open-mode", "output", "partition", "account", "requeue", "signal", "time",
)  # fmt: skip
"""Options of sbatch that this project sets itself."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run asks of SLURM. Raises UserError for what sbatch would not take."""

    nodes: int = 1
    gpus_per_node: int = 0
    """One process a GPU; 0 is a CPU cluster with gloo."""
    processes_per_node: int | None = None
    """Processes of a node without GPUs; one if not given."""
    cpus_per_task: int | None = None
    """CPU cores of a node, shared by its processes."""
    time: str | None = None
    """Limit as sbatch takes it: minutes, H:MM:SS, D-HH and the like."""
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    """Image that has dist-reg installed: a registry's or a .sqsh file with pyxis, a .sif file with apptainer."""
    mounts: tuple[str, ...] = ()
    """Folders that the container sees under the same path, beside the working directory and the run's folder."""
    python: str = "python3"
    """Interpreter of the nodes, or of the container."""
    grace: int = 180
    """Seconds before the time limit at which the run saves and is requeued."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as --qos=long."""

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--nodes", self.nodes, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
            ("--processes-per-node", self.processes_per_node, 1),
            ("--cpus-per-task", self.cpus_per_task, 1),
            ("--grace", self.grace, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{option} must be at least {least}; it is {value}.")
        if self.processes_per_node is not None and self.gpus_per_node:
            raise UserError(
                "--processes-per-node is for nodes without GPUs; with --gpus-per-node each GPU has one process."
            )
        for option, name in (("--partition", self.partition), ("--account", self.account)):
            if name is not None and not re.fullmatch(r"[\w.,:@+-]+", name):
                raise UserError(
                    f"{option} {name!r} is no name that SLURM knows; leave out spaces and quotes."
                )
        self._check_time()
        self._check_options()
        for mount in self.mounts:
            if not Path(mount).is_dir():
                raise UserError(f"--mount {mount} is not a folder.")

    def _check_time(self) -> None:
        if self.time is None:
            return
        seconds = seconds_of(self.time)
        if seconds <= self.grace:
            raise UserError(
                f"--time {self.time} is {seconds} seconds, and the run saves {self.grace} seconds before its end; give more "
                "time or a smaller --grace."
            )

    def _check_options(self) -> None:
        for option in self.options:
            match = re.fullmatch(r"--([a-z][a-z-]*)(=[^\n\r\\]+)?", option)
            if match is None:
                raise UserError(f"--sbatch {option!r} is not of the form --NAME=VALUE, such as --qos=long.")
            if match[1] in OWN:
                raise UserError(f"--sbatch {option}: dist-reg submit sets --{match[1]} itself.")

    @property
    def processes(self) -> int:
        """Processes over all nodes."""
        return self.nodes * (self.gpus_per_node or self.processes_per_node or 1)


def seconds_of(time: str) -> int:
    """A time limit of sbatch's in seconds. Raises UserError."""
    days = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", time)
    plain = re.fullmatch(r"(\d+)(?::(\d+))?(?::(\d+))?", time)
    if days:
        day, hours, minutes, seconds = (int(part or 0) for part in days.groups())
        return ((day * 24 + hours) * 60 + minutes) * 60 + seconds
    if plain:
        parts = [int(part) for part in plain.groups() if part is not None]
        if len(parts) < 3:  # minutes, or minutes:seconds
            return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    raise UserError(
        f"--time {time!r} is not a time of SLURM's; give minutes, H:MM:SS or D-HH:MM:SS, such as 2:00:00."
    )


def render(job: Job, *, name: str, folder: Path, output: Path, array: str | None = None) -> str:
    """The batch script of `job`, which trains `run.yaml` of the submission's `folder`, or of its `N/` for each N of `array`.

    `output` is the run directory, or the folder of an array's. Raises UserError for a path that SLURM cannot take.
    """
    if re.search(r"[\n\r\t\\]", str(folder)):
        raise UserError(
            f"train.output_dir: {str(folder)!r} holds a line break, tab or backslash, which a log of SLURM cannot; choose "
            "another folder."
        )
    log = str(folder).replace("%", "%%") + ("/%A_%a.log" if array else "/%j.log")
    directives = {
        "job-name": re.sub(r"[\n\r\t\\]", "-", name),
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "array": array,
        "signal": f"B:USR1@{job.grace}",
        "open-mode": "append",
        "output": log,
    }
    lines = [
        f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in directives.items() if value is not None
    ]
    lines.insert(-3, "#SBATCH --requeue")
    for option in job.options:
        key, _, value = option.partition("=")
        lines.append(f"#SBATCH {key}={shlex.quote(value)}" if value else f"#SBATCH {key}")
    place = shlex.quote(str(folder)) + ('/"$SLURM_ARRAY_TASK_ID"' if array else "")
    settings = [
        f"PYTHON={shlex.quote(job.python)}",
        f"GRACE={job.grace}",
        f"DIST_REG_RECORDS={place}/records",
        f"NPROC={job.processes_per_node or ''}",
        *container_settings(job, output),
        f"set -- {place}/run.yaml",
    ]
    template = template_text()
    body = template[template.index(BODY) :]
    return "\n".join(["#!/usr/bin/env bash", *lines, "set -uo pipefail", *settings, "", body])


def container_settings(job: Job, output: Path) -> list[str]:
    """Shell settings that put every task of the job into its container, if it has one."""
    if job.container is None:
        return ["srun_options=()", "container=()"]
    mounts = list(dict.fromkeys(str(Path(path).resolve()) for path in (".", output, *job.mounts)))
    for mount in mounts:
        if "," in mount or ":" in mount:
            raise UserError(f"--container: {mount} holds a comma or a colon, which a mount cannot.")
    if job.container.endswith(".sif"):
        binds = " ".join(f"--bind {shlex.quote(mount)}" for mount in mounts)
        gpu = "--nv " if job.gpus_per_node else ""
        image = shlex.quote(job.container)
        return ["srun_options=()", f'container=(apptainer exec {gpu}--pwd "$PWD" {binds} {image})']
    pairs = ",".join(f"{mount}:{mount}" for mount in mounts)
    options = " ".join(
        _quoted(f"--container-{key}={value}") for key, value in (("image", job.container), ("mounts", pairs))
    )
    return [f'srun_options=({options} --container-workdir="$PWD")', "container=()"]


def _quoted(text: str) -> str:
    """`text` in quotes, also where a shell would need none."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def template_text() -> str:
    """The text of `launch/slurm.sbatch`, from the checkout or the installed package."""
    package = Path(__file__).parent
    for folder in (package / "scripts", package.parent.parent / "launch"):
        if (folder / "slurm.sbatch").is_file():
            return (folder / "slurm.sbatch").read_text(encoding="utf-8")
    raise UserError("launch/slurm.sbatch is missing from this installation; install dist-reg again.")
