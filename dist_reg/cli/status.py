"""`dist-reg status DIR`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from dist_reg.errors import UserError
from dist_reg.launch.state import RunState, run_states

HEADER = ("run", "state", "job", "step", "loss", "examples/s", "s/step", "heard")


@click.command("status")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Show how far the runs at or below DIR are: job, last step, loss, throughput, and why one failed."""
    if not folder.is_dir():
        raise UserError(f"status: folder {folder} does not exist.")
    states = run_states(folder)
    if not states:
        raise UserError(f"status: no run in or below {folder}; dist-reg train and dist-reg submit make one.")
    table = Table(*HEADER, box=None, pad_edge=False)
    for state in states:
        table.add_row(*cells(state, folder.absolute()))
    console = Console()
    console.print(table, highlight=False, markup=False)
    counts = {
        name: sum(state.state == name for state in states) for name in sorted({s.state for s in states})
    }
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()), highlight=False)
    for state in states:
        if state.state == "failed":
            console.print(
                f"\n{shown(state, folder.absolute())}: {first_line(state.failure)}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            console.print(f"log {state.log}", highlight=False, markup=False, soft_wrap=True)


def cells(state: RunState, root: Path) -> list[str]:
    """One row of the table."""
    progress = state.progress
    step = f"{progress['step']}/{progress['max_steps']}" if progress else ""
    numbers = [progress.get(name) for name in ("loss", "examples_per_second", "seconds_per_step")]
    texts = ["" if number is None else f"{number:.4g}" for number in numbers]
    heard = "" if state.age is None else duration(state.age)
    return [shown(state, root), state.state, state.job, step, *texts, heard]


def shown(state: RunState, root: Path) -> str:
    """The run's folder, seen from the folder that was asked about."""
    if state.folder == root:
        return root.name
    return str(state.folder.relative_to(root)) if state.folder.is_relative_to(root) else str(state.folder)


def first_line(text: str) -> str:
    """What a failure says before its traceback."""
    return text.splitlines()[0] if text else ""


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit, as 12 s, 3 min, 2 h or 5 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
