"""Learning curves: what the logs of a group's runs say over steps, as means over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from dist_reg.errors import reason
from dist_reg.report.blocks import Block
from dist_reg.report.runs import Run

LOG = "log.jsonl"
LOSS, TASK_LOSS = "training loss", "training task loss"
DEV = "dev "


@dataclass(frozen=True)
class Point:
    """One quantity of one group at one step: mean and standard deviation over the runs that logged it there.

    The mean is NaN where a run diverged.
    """

    task: str
    model: str
    examples: int
    methods: str
    quantity: str
    step: int
    runs: int
    mean: float
    std: float | None


def learning_curves(blocks: list[Block]) -> tuple[list[Point], list[str]]:
    """Training loss and development metrics over steps, and a note on the runs whose log cannot be used."""
    points, unusable = [], []
    for block in blocks:
        for group in block.groups:
            found: dict[tuple[str, int], list[float]] = defaultdict(list)
            for run in group.runs:
                try:
                    curve = read_curve(run)
                except (OSError, ValueError) as error:
                    unusable.append(f"{run.folder} ({_why(error)})")
                    continue
                for place, value in curve.items():
                    found[place].append(value)
            for quantity, step in sorted(found, key=lambda place: (place[0].startswith(DEV), *place)):
                values = found[quantity, step]
                finite = all(map(math.isfinite, values))
                mean = statistics.fmean(values) if finite else math.nan
                std = statistics.stdev(values) if finite and len(values) > 1 else None
                points.append(
                    Point(
                        block.task, block.model, block.train_examples, group.label,
                        quantity, step, len(values), mean, std,
                    )
                )  # fmt: skip
    notes = [f"not in the learning curves: {', '.join(unusable)}."] if unusable else []
    return _without_task_loss(points), notes


def read_curve(run: Run) -> dict[tuple[str, int], float]:
    """What the log of `run` says, by quantity and step; of a step that was done again, the last time.

    The evaluation behind the last step is left out: it is of the model that was kept, which may be an earlier one.

    Raises:
        OSError: the log cannot be read.
        ValueError: it is empty, or a line is none of a log.
    """
    metrics = run.results["metrics"].get("dev", {})
    names = {
        "loss": LOSS,
        "task_loss": TASK_LOSS,
        **{f"eval_{metric}": f"{DEV}{metric}" for metric in metrics},
    }
    curve: dict[tuple[str, int], float] = {}
    lines = (run.folder / LOG).read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, start=1):
        line = _parse(text)
        found = {name: line[key] for key, name in names.items() if key in line}
        if not isinstance(line.get("step"), int) or not all(
            isinstance(v, (int, float)) for v in found.values()
        ):
            raise ValueError(f"{LOG}, line {number} is damaged")
        curve |= {(name, line["step"]): float(value) for name, value in found.items()}
    if not curve:
        raise ValueError(f"{LOG} holds nothing to draw")
    return curve


def _parse(text: str) -> dict[str, Any]:
    """A line of a log; empty where it is torn."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no {LOG}"
    if isinstance(error, UnicodeDecodeError):
        return f"{LOG} is no text"
    return reason(error)


def _without_task_loss(points: list[Point]) -> list[Point]:
    """`points` without the task's loss where it is the whole loss everywhere, as in plain fine-tuning."""
    whole = {(*_place(point), point.mean) for point in points if point.quantity == LOSS}
    task = [point for point in points if point.quantity == TASK_LOSS]
    if all((*_place(point), point.mean) in whole for point in task):
        return [point for point in points if point.quantity != TASK_LOSS]
    return points


def _place(point: Point) -> tuple:
    return point.task, point.model, point.examples, point.methods, point.step
