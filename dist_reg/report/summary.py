"""Everything that is said of a folder of runs: means, comparisons, curves, and notes for the reader."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from dist_reg.errors import UserError, nearest
from dist_reg.report.blocks import Block, Group, arrange
from dist_reg.report.comparison import NAMES, SIGNIFICANT, TESTS, Comparison, compare, holm
from dist_reg.report.curves import Point, learning_curves
from dist_reg.report.runs import PLAIN, Run, Seeds

FEW_PAIRS = 20
"""Below it the bootstrap holds what it promises badly: docs/report.md has the figures."""


@dataclass(frozen=True)
class Score:
    """One group on one evaluation set."""

    group: Group
    name: str
    mean: float
    std: float | None
    """None of a single run."""
    best: float | None
    """Of the best run; None where neither greater nor smaller is better."""
    first: bool
    """Whether no other group of the block has a better mean."""
    comparison: Comparison | None = None
    p_holm: float | None = None
    comparisons: int = 0
    """How many p-values `p_holm` is corrected for: the groups compared with this baseline on this set."""

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class Table:
    """The scores of a block, group by group and set by set."""

    block: Block
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Summary:
    """What a report says. `notes` are what a reader must know beside the numbers."""

    tables: tuple[Table, ...]
    curves: tuple[Point, ...]
    notes: tuple[str, ...]
    test: str
    baseline: str

    @property
    def compared(self) -> bool:
        return any(score.comparison for table in self.tables for score in table.scores)

    @property
    def legend(self) -> list[str]:
        """How to read the tables."""
        lines = [
            "mean (standard deviation over seeds), best run; times 100 where the metric says %; train s: mean "
            "seconds of training."
        ]
        if not self.compared:
            return lines
        scores = [score for table in self.tables for score in table.scores]
        corrected = max(score.comparisons for score in scores) > 1
        lines.append(
            f"difference: from {self.baseline}, mean over pairs of runs that share data seed and seed, with its 95 % "
            f"interval; p: {NAMES[self.test]}, not corrected"
            + (
                f"; p Holm: corrected for the groups compared with one baseline on one set; * p Holm < {SIGNIFICANT}."
                if corrected
                else f"; * p < {SIGNIFICANT}."
            )
        )
        if self.test == "bootstrap" and any(s.comparison and s.comparison.pairs < FEW_PAIRS for s in scores):
            lines.append(
                f"With fewer than {FEW_PAIRS} pairs the bootstrap's interval is too narrow and its p may be too small."
            )
        return lines


def summarise(
    runs: list[Run], *, test: str = "t-test", baseline: str = PLAIN, mix: bool = False, unfinished: int = 0
) -> Summary:
    """Summarise `runs`, every group against `baseline` (a label) by `test` ("t-test", "bootstrap" or "none").

    `unfinished` is how many run folders were passed over, for the notes.

    Raises:
        UserError: settings that differ, without `mix`; a baseline or a test that is not there.
    """
    if test != "none" and test not in TESTS:
        raise UserError(f"report: unknown test {test!r}; {nearest(test, [*TESTS, 'none'])}")
    blocks, notes = arrange(runs, mix=mix)
    labels = [label for block in blocks for group in block.groups for label in (group.label, group.method)]
    if baseline not in (*labels, PLAIN):
        raise UserError(
            f"--baseline: no group is called {baseline!r}; {nearest(baseline, [*dict.fromkeys(labels)])}"
        )
    tables = []
    for block in blocks:
        baselines = {} if test == "none" else _baselines(block, baseline)
        tables.append(Table(block, _scores(block, baselines, test)))
        if test != "none":
            notes += _missing(block, baselines, baseline)
            notes += _unpaired(tables[-1])
    curves, without = learning_curves(blocks)
    notes += without
    if unfinished:
        notes.append(f"run folders without results, passed over: {unfinished}.")
    return Summary(tuple(tables), tuple(curves), tuple(notes), test, baseline)


def _baselines(block: Block, wanted: str) -> dict[str, Group]:
    """The baseline of every group that has one, by the group's label.

    Of several groups that fit, as under --mix, it is the one with the group's own settings.
    """
    fitting = [group for group in block.groups if group.label == wanted]
    fitting = fitting or [group for group in block.groups if group.method == wanted]
    found = {}
    for group in block.groups:
        if group in fitting:
            continue
        alike = [other for other in fitting if other.settings == group.settings]
        if alike or len(fitting) == 1:
            found[group.label] = (alike or fitting)[0]
    return found


def _scores(block: Block, baselines: dict[str, Group], test: str) -> tuple[Score, ...]:
    scores = []
    for group in block.groups:
        for name in block.names:
            own = group.scores(name)
            if not own:
                continue
            base = baselines.get(group.label)
            compared = compare(own, base.scores(name), test, base.label) if base else None
            scores.append(_score(block, group, name, own, compared))
    return tuple(_corrected(scores))


def _score(
    block: Block, group: Group, name: str, own: dict[Seeds, float], compared: Comparison | None
) -> Score:
    values = list(own.values())
    better = block.better(name)
    pick = max if better else min
    means = [statistics.fmean(found.values()) for other in block.groups if (found := other.scores(name))]
    mean = statistics.fmean(values)
    return Score(
        group=group,
        name=name,
        mean=mean,
        std=statistics.stdev(values) if len(values) > 1 else None,
        best=None if better is None else pick(values),
        first=better is not None and len(means) > 1 and mean == pick(means),
        comparison=compared,
    )


def _corrected(scores: list[Score]) -> list[Score]:
    """`scores` with p-values corrected among those of one baseline on one set."""
    families: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for index, score in enumerate(scores):
        if score.comparison and score.comparison.p is not None:
            family = families.setdefault((score.name, score.comparison.baseline), [])
            family.append((index, score.comparison.p))
    corrected = list(scores)
    for family in families.values():
        for (index, _), p in zip(family, holm([p for _, p in family])):
            corrected[index] = replace(scores[index], p_holm=p, comparisons=len(family))
    return corrected


def _missing(block: Block, baselines: dict[str, Group], wanted: str) -> list[str]:
    """A note on groups that have no baseline."""
    fitting = [group.label for group in block.groups if wanted in (group.label, group.method)]
    if not fitting:
        return [f"{block.title}: no run of the baseline, {wanted}; nothing is compared."]
    alone = [group.label for group in block.groups if group.label not in (*baselines, *fitting)]
    return [
        f"{block.title}: {label} is compared with nothing: its settings are those of none of {'; '.join(fitting)}; "
        "--baseline names one."
        for label in alone
    ]


def _unpaired(table: Table) -> list[str]:
    """Notes naming the seeds that have no partner, once a group."""
    notes = {}
    for score in table.scores:
        compared = score.comparison
        if compared is None or not (compared.own_unpaired or compared.baseline_unpaired):
            continue
        sides = [
            f"{len(seeds)} of {label}: {', '.join(f'{data}/{seed}' for data, seed in seeds)}"
            for label, seeds in (
                (score.group.label, compared.own_unpaired),
                (compared.baseline, compared.baseline_unpaired),
            )
            if seeds
        ]
        notes.setdefault(
            score.group.label,
            f"{table.block.title}: runs without a partner (data seed/seed), left out of the comparison: "
            f"{'; '.join(sides)}.",
        )
    return list(notes.values())
