"""What the results of one run say: what was done, with which seeds, how well."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_reg.errors import UserError, reason
from dist_reg.methods import METHODS
from dist_reg.rundir import LOCK, RESULTS, RUN_FILE

NEEDED = ("task", "model", "train_examples", "methods", "main_metric", "metrics", "timings")
"""What a result must hold to be summarised."""

PLAIN = "plain"
"""The label of a run without methods and without a dropout of its own: the baseline."""

GAP = "gap"

DOMAINS = {"in_domain": "in domain", "out_of_domain": "out of domain", GAP: "gap"}
"""What `domains` of a result may hold, and its name for people."""

Seeds = tuple[Any, Any]
"""(data seed, training seed)."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the content of its results.json."""

    folder: Path
    results: dict[str, Any]

    @property
    def seeds(self) -> Seeds:
        """What tells it from the other runs of its group."""
        return self.results.get("data_seed"), self.results.get("seed")

    @property
    def block(self) -> tuple:
        """What runs must share to stand in one table."""
        results = self.results
        return (
            results["task"],
            results["model"],
            results["train_examples"],
            results["main_metric"],
            results.get("main_metric_scale") or "percent",
            results.get("greater_is_better") is not False,
        )

    @property
    def label(self) -> str:
        """What was done in short: the methods with the options that are not defaults, or plain, and the dropout."""
        names = []
        for entry in self.results["methods"]:
            for name, options in entry.items():
                fields = dataclasses.fields(METHODS[name]) if name in METHODS else ()
                defaults = {field.name: field.default for field in fields}
                changed = [f"{key} {value}" for key, value in options.items() if defaults.get(key) != value]
                names.append(" ".join([name, *changed]))
        dropout = [f"{key} {value}" for key, value in self._model_config.items() if is_dropout(key)]
        return ", ".join([" + ".join(names) or PLAIN, *dropout])

    @property
    def settings(self) -> dict[str, Any] | None:
        """What runs of a block must share, by the keys of a run file; None where an older version wrote none."""
        settings = self.results.get("settings")
        if settings is None:
            return None
        config = {key: value for key, value in self._model_config.items() if not is_dropout(key)}
        return {**settings, "model": {"config": config}} if config else settings

    @property
    def _model_config(self) -> dict[str, Any]:
        return self.results.get("model_config") or {}

    @property
    def scores(self) -> dict[str, float]:
        """The main metric on every evaluation set, and over domains where the run has several.

        The names of domains are those of `DOMAINS`, behind `domains.` where an evaluation set is called so.
        """
        metric, metrics = self.results["main_metric"], self.results["metrics"]
        scores = {name: values[metric] for name, values in metrics.items() if metric in values}
        domains = self.results.get("domains") or {}
        for name in DOMAINS:
            if domains.get(name) is not None:
                scores[name if name not in metrics else f"domains.{name}"] = domains[name]
        return scores


def is_dropout(key: str) -> bool:
    """Whether a field of a model's configuration is a dropout: hidden_dropout_prob, attn_pdrop and the like."""
    return "drop" in key


def read_runs(folder: Path) -> list[Run]:
    """Every finished run below `folder`. Raises UserError when there is none or a result is none of ours."""
    if not folder.is_dir():
        raise UserError(f"report: folder {folder} {'is a file' if folder.exists() else 'does not exist'}.")
    runs = [Run(path.parent, _read(path)) for path in sorted(folder.rglob(RESULTS))]
    if not runs:
        waiting = len(unfinished(folder))
        raise UserError(
            f"report: no finished run (a {RESULTS}) below {folder}"
            + (f"; run folders without one: {waiting}." if waiting else ".")
        )
    return runs


def unfinished(folder: Path) -> list[Path]:
    """Run folders below `folder` that have begun and hold no results."""
    begun = (path.parent for path in sorted(folder.rglob(RUN_FILE)))
    traces = ("log.jsonl", "checkpoints", LOCK)
    return [
        run
        for run in begun
        if not (run / RESULTS).exists() and any((run / trace).exists() for trace in traces)
    ]


def _read(path: Path) -> dict[str, Any]:
    """The content of a results.json, checked as far as a report reads it."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"report: {path} cannot be read ({reason(error)}).") from None
    except ValueError as error:
        raise UserError(f"report: {path} is not valid JSON ({error}).") from None
    missing = [key for key in NEEDED if not isinstance(results, dict) or key not in results]
    if missing:
        raise UserError(f"report: {path} is no result of a run; it lacks {missing[0]!r}.")
    try:
        run = Run(path.parent, results)
        scores = {**run.scores, "timings.train_seconds": results["timings"]["train_seconds"]}
        hash((run.block, run.seeds, run.label))
        parts = (results["train_examples"], int), ({} if run.settings is None else run.settings, dict)
        if not all(isinstance(part, kind) for part, kind in parts) or not all(
            isinstance(results[key], str) for key in ("task", "model", "main_metric")
        ):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"report: {path} is no result of a run; its parts are not what a run writes."
        ) from None
    if not run.scores:
        raise UserError(f"report: {path} has no {results['main_metric']} on any evaluation set.")
    for name, value in scores.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(
                f"report: {path}: {name} is {value!r}, no finite number; mend the run or move it away."
            )
    if results.get("main_metric_scale") not in (None, "percent", "number"):
        raise UserError(
            f"report: {path}: main_metric_scale is {results['main_metric_scale']!r}; known: number, percent"
        )
    return results
