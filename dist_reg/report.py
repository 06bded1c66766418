"""Summaries of finished runs: means and deviations over seeds, as a table, csv, Markdown and a plot."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_reg.errors import UserError
from dist_reg.methods import METHODS
from dist_reg.rundir import RESULTS, first_difference

NEEDED = ("task", "model", "train_examples", "methods", "main_metric", "metrics", "timings")
"""What a result must hold to be summarised."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone (data sample or training), one a pair of seeds."""

    task: str
    model: str
    train_examples: int
    label: str
    runs: tuple[dict[str, Any], ...]

    def scores(self, evaluation_set: str) -> list[float]:
        """The main metric of every run on one evaluation set."""
        return [
            run["metrics"][evaluation_set][run["main_metric"]]
            for run in self.runs
            if evaluation_set in run["metrics"]
        ]

    @property
    def seconds(self) -> list[float]:
        """Training time of every run, in seconds."""
        return [run["timings"]["train_seconds"] for run in self.runs]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every results.json below `folder`. Raises UserError when there is none or one does not parse."""
    if not folder.is_dir():
        raise UserError(f"report: folder {folder} does not exist.")
    results = []
    for path in sorted(folder.rglob(RESULTS)):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"report: {path} is not valid JSON ({error}).") from None
        missing = [key for key in NEEDED if not isinstance(result, dict) or key not in result]
        if missing:
            raise UserError(f"report: {path} is no result of a run; it lacks {missing[0]!r}.")
        results.append(result)
    if not results:
        raise UserError(f"report: no finished run (a {RESULTS}) below {folder}.")
    return results


def label(result: dict[str, Any]) -> str:
    """Short name of what was done in a run: its methods with the options that are not defaults, or plain."""
    names = []
    for entry in result["methods"]:
        for name, options in entry.items():
            fields = dataclasses.fields(METHODS[name]) if name in METHODS else ()
            defaults = {field.name: field.default for field in fields}
            changed = [f"{key} {value}" for key, value in options.items() if defaults.get(key) != value]
            names.append(" ".join([name, *changed]))
    settings = [f"{key} {value}" for key, value in result.get("model_config", {}).items()]
    return ", ".join([" + ".join(names) or "plain", *settings])


def group(results: list[dict[str, Any]]) -> list[Group]:
    """`results` by task, model, number of examples, methods and settings: what is left to differ is the seed.

    Where two groups differ in their settings alone, the labels say in which.
    """
    found: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        key = (result["task"], result["model"], result["train_examples"], label(result))
        found[(*key, json.dumps(result.get("settings", {}), sort_keys=True))].append(result)
    short = _short_names({key[1] for key in found})
    plain_first = sorted(found, key=lambda key: (*key[:3], not key[3].startswith("plain"), *key[3:]))
    groups = []
    for key in plain_first:
        others = [json.loads(other[4]) for other in found if other[:4] == key[:4]]
        groups.append(
            Group(
                task=key[0],
                model=short[key[1]],
                train_examples=key[2],
                label=key[3] + _distinction(json.loads(key[4]), others),
                runs=_one_a_seed(found[key]),
            )
        )
    return groups


def _short_names(models: set[str]) -> dict[str, str]:
    """The last part of each model's path, or the whole where two share it."""
    last = [Path(model).name for model in models]
    return {model: Path(model).name if last.count(Path(model).name) == 1 else model for model in models}


def _one_a_seed(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The first run of every pair of seeds; the same run twice, or on two topologies, is no second seed."""
    first: dict[Any, dict[str, Any]] = {}
    for run in runs:
        seeds = (run.get("seed"), run.get("data_seed"))
        if seeds in first:
            logger.warning(
                "report: %s of %s with seed %s and data seed %s is there more than once; the first counts.",
                label(run),
                run["task"],
                *seeds,
            )
        first.setdefault(seeds, run)
    return tuple(first.values())


def _distinction(own: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The settings of `own` in which one of `others` differs, as text."""
    keys = {difference[0] for other in others if (difference := first_difference(own, other)) is not None}
    text = ""
    for key in sorted(keys):
        value: Any = own
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        text += f", {key} {value}"
    return text


def rows(groups: list[Group]) -> list[dict[str, Any]]:
    """One flat row a group: seeds, mean and standard deviation per evaluation set, training seconds."""
    table = []
    for entry in groups:
        row: dict[str, Any] = {
            "task": entry.task,
            "model": entry.model,
            "examples": entry.train_examples,
            "methods": entry.label,
            "seeds": len(entry.runs),
            "metric": entry.runs[0]["main_metric"],
        }
        for name in entry.runs[0]["metrics"]:
            scores = entry.scores(name)
            row[f"{name}_mean"] = statistics.fmean(scores)
            row[f"{name}_std"] = statistics.stdev(scores) if len(scores) > 1 else None
        row["train_seconds"] = statistics.fmean(entry.seconds)
        table.append(row)
    return table


def texts(table: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells for people: "81.2 (0.9)" is mean and standard deviation in percent points."""
    sets = list(dict.fromkeys(key[: -len("_mean")] for row in table for key in row if key.endswith("_mean")))
    header = ["task", "model", "examples", "methods", "seeds", *[f"{name}" for name in sets], "train s"]
    cells = []
    for row in table:
        line = [row["task"], row["model"], str(row["examples"]), row["methods"], str(row["seeds"])]
        for name in sets:
            mean, std = row.get(f"{name}_mean"), row.get(f"{name}_std")
            text = "" if mean is None else f"{100 * mean:.1f}"
            line.append(text + (f" ({100 * std:.1f})" if std is not None else ""))
        cells.append([*line, f"{row['train_seconds']:.0f}"])
    return header, cells


def write(folder: Path, table: list[dict[str, Any]], groups: list[Group]) -> list[Path]:
    """Write report.csv, report.md and report.png to `folder`, and report.layers.png where runs logged something for every
    layer; returns their paths."""
    paths = [folder / f"report.{suffix}" for suffix in ("csv", "md", "png")]
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)))
        writer.writeheader()
        writer.writerows(table)
    header, cells = texts(table)
    lines = [header, ["---"] * len(header), *cells]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    metrics = " and ".join(dict.fromkeys(row["metric"] for row in table))
    note = f"Mean (standard deviation) of {metrics} over seeds, in percent; seconds are means."
    paths[1].write_text(f"{text}\n\n{note}\n", encoding="utf-8")
    plot(groups, paths[2])
    curves = by_layer(groups)
    if curves:
        paths.append(folder / "report.layers.png")
        plot_by_layer(curves, paths[-1])
    return paths


def by_layer(groups: list[Group]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """What runs last logged for every layer, such as HIRE's gates: by metric, group and layer, one value a run."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for entry in groups:
        name = f"{entry.label}, {entry.task}, {entry.train_examples}"
        for run in entry.runs:
            for metric, value in run.get("terms", {}).items():
                if match := _OF_LAYER.fullmatch(metric):
                    curve = found.setdefault(match[1], {}).setdefault(name, {})
                    curve.setdefault(int(match[2]), []).append(value)
    return found


_OF_LAYER = re.compile(r"(.+/.+)_(\d+)")


def plot_by_layer(curves: dict[str, dict[str, dict[int, list[float]]]], path: Path) -> None:
    """One panel a metric, one curve a group: the mean over runs by layer, with the standard deviation as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), 1, squeeze=False)[:, 0]
    for axis, (metric, by_group) in zip(axes, curves.items()):
        for name, curve in by_group.items():
            layers = sorted(curve)
            means = [statistics.fmean(curve[layer]) for layer in layers]
            spread = [statistics.stdev(curve[layer]) if len(curve[layer]) > 1 else 0.0 for layer in layers]
            axis.errorbar(layers, means, yerr=spread, marker="o", capsize=3, label=name)
        axis.set_xticks(sorted({layer for curve in by_group.values() for layer in curve}))
        axis.set_xlabel("layer")
        axis.set_ylabel(metric)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def plot(groups: list[Group], path: Path) -> None:
    """Every run as a point, the mean as a bar, one panel an evaluation set."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(name for entry in groups for name in entry.runs[0]["metrics"]))
    figure = Figure(figsize=(4 * len(sets) + 1, 0.6 * len(groups) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(sets), squeeze=False, sharey=True)[0]
    names = [f"{entry.label}\n{entry.task}, {entry.train_examples}" for entry in groups]
    for axis, name in zip(axes, sets):
        for height, entry in enumerate(groups):
            scores = [100 * score for score in entry.scores(name)]
            if not scores:
                continue
            axis.barh(height, statistics.fmean(scores), color="0.82")
            axis.plot(scores, [height] * len(scores), "o", color="tab:blue", markersize=5, alpha=0.8)
        values = [100 * score for entry in groups for score in entry.scores(name)]
        axis.set_xlim(min(values) - 5, min(100, max(values) + 5))
        axis.set_title(name)
        axis.set_xlabel(f"{groups[0].runs[0]['main_metric']}, %")
    axes[0].set_yticks(range(len(groups)), names)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)
