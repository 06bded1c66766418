"""Blocks of runs that can be compared, and groups within them that differ in their seeds alone."""

from __future__ import annotations

import json
import reprlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_reg.errors import UserError
from dist_reg.report.runs import DOMAINS, GAP, PLAIN, Run, Seeds

NOT_RECORDED = "null"
"""The settings, as JSON, of runs that lack them."""


@dataclass(frozen=True)
class Group:
    """Runs of one method that differ in their seeds alone, one a pair of seeds."""

    method: str
    """What was done, in short: `Run.label`."""
    label: str
    """The same, with the settings in which another group of the block differs."""
    settings: str
    """The settings that its runs share by dotted key, as JSON."""
    runs: tuple[Run, ...]

    def scores(self, name: str) -> dict[Seeds, float]:
        """The score called `name` of every run that has it, by seeds."""
        return {run.seeds: run.scores[name] for run in self.runs if name in run.scores}

    @property
    def seconds(self) -> list[float]:
        """Training time of every run, in seconds."""
        return [run.results["timings"]["train_seconds"] for run in self.runs]


@dataclass(frozen=True)
class Block:
    """Groups on one task, model and number of examples, under one metric."""

    task: str
    model: str
    train_examples: int
    metric: str
    scale: str
    """`percent`: scores are shown times 100; `number`: as they are."""
    greater_is_better: bool
    groups: tuple[Group, ...]

    @property
    def title(self) -> str:
        return f"{self.task}, {self.model}, {self.train_examples} examples"

    @cached_property
    def names(self) -> list[str]:
        """The scores that its runs have: evaluation sets as they came, then the domains."""
        found = dict.fromkeys(name for group in self.groups for run in group.runs for name in run.scores)
        return sorted(found, key=lambda name: name.removeprefix("domains.") in DOMAINS)

    def metric_of(self, name: str) -> str:
        """The metric of a score: the block's, or of the domains the one that they are in."""
        run = next(run for group in self.groups for run in group.runs if name in run.scores)
        own = name in run.results["metrics"]
        return self.metric if own else run.results["domains"].get("metric") or self.metric

    def title_of(self, name: str) -> str:
        """The name of a score for people; domains under another metric than the block's say which."""
        run = next(run for group in self.groups for run in group.runs if name in run.scores)
        if name in run.results["metrics"]:
            return name
        metric = self.metric_of(name)
        return DOMAINS[name.removeprefix("domains.")] + (f" {metric}" if metric != self.metric else "")

    @property
    def factor(self) -> int:
        """What a score is multiplied with for people."""
        return 100 if self.scale == "percent" else 1

    @property
    def unit(self) -> str:
        """The metric with its unit."""
        return self.metric + (", %" if self.scale == "percent" else "")

    def axis_of(self, name: str) -> str:
        """The name of a score with its metric and unit."""
        return f"{self.title_of(name)}: {self.unit.replace(self.metric, self.metric_of(name), 1)}"

    def better(self, name: str) -> bool | None:
        """Whether greater is better; None for the gap between domains, which is small at chance too."""
        return None if name.removeprefix("domains.") == GAP else self.greater_is_better


def arrange(runs: list[Run], *, mix: bool = False) -> tuple[list[Block], list[str]]:
    """`runs` in blocks and groups, the plain ones first, and what a reader must be told of that.

    Runs of a block must share their settings, all but seeds, folder, topology and methods; with `mix` they may differ,
    and make groups of their own whose labels say in what.

    Raises:
        UserError: settings that differ, without `mix`.
    """
    found: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.block].append(run)
    short = _short_names({key[1] for key in found})
    blocks, notes = [], _without_settings(runs)
    for key in sorted(found):
        if not mix:
            _refuse_differences(found[key])
        groups, repeated = _groups(found[key])
        notes += repeated
        task, model, examples, metric, scale, greater = key
        blocks.append(Block(task, short[model], examples, metric, scale, greater, groups))
    return blocks, [*notes, *_environments(found.values())]


def _short_names(models: set[str]) -> dict[str, str]:
    """The last part of each model's path, or the whole where two share it."""
    last = [Path(model).name for model in models]
    return {model: Path(model).name if last.count(Path(model).name) == 1 else model for model in models}


def _refuse_differences(runs: list[Run]) -> None:
    """Raise UserError where two runs of a block were not trained alike."""
    known = [(run, _flat(run.settings)) for run in runs if run.settings is not None]
    for run, settings in known[1:]:
        first, expected = known[0]
        keys = sorted(settings.keys() | expected.keys())
        key = next((key for key in keys if settings.get(key) != expected.get(key)), None)
        if key is not None:
            there, here = _shown(expected.get(key)), _shown(settings.get(key))
            raise UserError(
                f"report: {key} is {there} in {first.folder} and {here} in {run.folder}, and runs that are compared may "
                "differ in their methods alone; --mix shows them as groups of their own, or name a sub-folder whose runs "
                "share it."
            )


def _shown(value: Any) -> str:
    return "not given" if value is None else reprlib.repr(value)


def _groups(runs: list[Run]) -> tuple[tuple[Group, ...], list[str]]:
    """The runs of a block by method and settings, and notes on runs that are there twice.

    A run that lacks settings is taken for one of the others' where those agree.
    """
    known = {_as_json(run.settings) for run in runs if run.settings is not None}
    lacking = known.pop() if len(known) == 1 else NOT_RECORDED
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        found[run.label, lacking if run.settings is None else _as_json(run.settings)].append(run)
    distinctions = _distinctions({settings for _, settings in found})
    groups, notes = [], []
    for method, settings in sorted(found, key=lambda key: (not key[0].startswith(PLAIN), key)):
        unique, repeated = _one_a_seed(found[method, settings])
        notes += repeated
        groups.append(Group(method, method + distinctions[settings], settings, unique))
    return tuple(groups), notes


def _as_json(settings: dict[str, Any] | None) -> str:
    return NOT_RECORDED if settings is None else json.dumps(_flat(settings), sort_keys=True)


def _one_a_seed(runs: list[Run]) -> tuple[tuple[Run, ...], list[str]]:
    """The first run of every pair of seeds; the same run twice, or on two topologies, is no second seed."""
    first: dict[Seeds, Run] = {}
    notes = []
    for run in runs:
        kept = first.setdefault(run.seeds, run)
        if kept is not run:
            notes.append(
                f"{run.label} of {run.results['task']} with data seed {run.seeds[0]} and seed {run.seeds[1]} is there "
                f"more than once; {kept.folder} counts, {run.folder} does not."
            )
    return tuple(first.values()), notes


def _distinctions(found: set[str]) -> dict[str, str]:
    """For each of several settings, as JSON, those in which it differs from another, as text."""
    flat = {settings: json.loads(settings) for settings in found if settings != NOT_RECORDED}
    keys = sorted({key for leaves in flat.values() for key in leaves})
    differing = [key for key in keys if len({json.dumps(leaves.get(key)) for leaves in flat.values()}) > 1]
    texts = {NOT_RECORDED: ", settings not recorded" if flat else ""}
    for settings, leaves in flat.items():
        told = (f", {key} {leaves.get(key, 'not given')}" for key in differing)
        texts[settings] = "".join(told)
    return texts


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key, without those that say nothing: None and empty mappings."""
    if not isinstance(value, dict):
        return {} if value is None else {key: value}
    return {
        name: leaf
        for part, inner in value.items()
        for name, leaf in _flat(inner, f"{key}.{part}" if key else part).items()
    }


def _without_settings(runs: list[Run]) -> list[str]:
    """A note on runs of which an older version recorded no settings."""
    lacking = [run.folder for run in runs if run.settings is None]
    if not lacking:
        return []
    return [
        f"results of an older version, without settings: {len(lacking)} ({', '.join(map(str, lacking))}); whether these "
        "runs were trained like the others is not known."
    ]


def _environments(blocks: Any) -> list[str]:
    """One note where runs of a block were made with different software or on different devices."""
    differing: dict[str, set[str]] = defaultdict(set)
    for runs in blocks:
        found: dict[str, set[str]] = defaultdict(set)
        for run in runs:
            for name, version in (run.results.get("versions") or {}).items():
                found[name].add(version)
            devices = (run.results.get("hardware") or {}).get("devices")
            if devices:
                found["device"].add(" + ".join(sorted(set(devices))))
            if commit := run.results.get("git_commit"):
                found["commit"].add(commit[:8] + "+" * commit.endswith("+"))
        for name, values in found.items():
            if len(values) > 1:
                differing[name] |= values
    if not differing:
        return []
    told = "; ".join(f"{name} {', '.join(sorted(values))}" for name, values in sorted(differing.items()))
    return [f"warning: runs of one table were made under different software or on different devices: {told}."]
