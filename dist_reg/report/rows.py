"""The numbers of a summary as csv has them, one row a group, and as people read them, one line a group and set."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from dist_reg.report.blocks import Block
from dist_reg.report.summary import Score, Summary, Table


def rows(summary: Summary) -> list[dict[str, Any]]:
    """One flat row a group, unrounded; a column's name begins with the evaluation set where it is of one."""
    return [_row(summary, table, group) for table in summary.tables for group in table.block.groups]


def _row(summary: Summary, table: Table, group: Any) -> dict[str, Any]:
    block = table.block
    scores = [score for score in table.scores if score.group is group]
    row: dict[str, Any] = {
        "task": block.task,
        "model": block.model,
        "examples": block.train_examples,
        "methods": group.label,
        "seeds": len(group.runs),
        "metric": block.metric,
    }
    if summary.compared:
        compared = next((score.comparison for score in scores if score.comparison), None)
        row |= {"baseline": compared and compared.baseline, "test": compared and summary.test}
    for score in scores:
        found = {"mean": score.mean, "std": score.std, "best": score.best}
        if score.comparison:
            compared = score.comparison
            found |= {
                "difference": compared.difference,
                "difference_low": compared.low,
                "difference_high": compared.high,
                "p": compared.p,
                "p_holm": score.p_holm,
                "comparisons": score.comparisons or None,
                "pairs": compared.pairs,
                "unpaired": len(compared.own_unpaired),
                "no_p_because": compared.words or None,
            }
        row |= {f"{score.name}_{key}": value for key, value in found.items()}
    return {**row, "train_seconds": statistics.fmean(group.seconds)}


@dataclass(frozen=True)
class Cell:
    """Text of a table for people."""

    text: str
    bold: bool = False
    mark: bool = False


def header(summary: Summary) -> list[str]:
    """The columns for people; those of comparisons only where there are any."""
    compared = ["difference [95 %]", "p"] if summary.compared else []
    if any(score.comparisons > 1 for table in summary.tables for score in table.scores):
        compared.append("p Holm")
    return ["methods", "seeds", "set", "mean (std)", "best", *compared, "train s"]


def title(block: Block) -> str:
    """What a table is about."""
    return f"{block.title}: {block.unit}"


def cells(summary: Summary, table: Table) -> list[list[Cell]]:
    """The lines of one block, under `header`; what is the same for all sets of a group stands in its first line."""
    columns = header(summary)
    lines, previous = [], None
    for score in table.scores:
        line = _line(table.block, score, marked="p Holm" if "p Holm" in columns else "p")
        if score.group is previous:
            line |= {"methods": Cell(""), "seeds": Cell(""), "train s": Cell("")}
        previous = score.group
        lines.append([line.get(column, Cell("")) for column in columns])
    return lines


def _line(block: Block, score: Score, marked: str) -> dict[str, Cell]:
    """The cells of a score by column; `marked` is the column whose p-value has the star."""
    std = "" if score.std is None else f" ({number(block, score.std)})"
    line = {
        "methods": Cell(score.group.label),
        "seeds": Cell(str(len(score.group.runs))),
        "set": Cell(block.title_of(score.name)),
        "mean (std)": Cell(number(block, score.mean) + std, bold=score.first),
        "best": Cell("" if score.best is None else number(block, score.best)),
        "train s": Cell(f"{statistics.fmean(score.group.seconds):.0f}"),
    }
    compared = score.comparison
    if compared is None:
        return line
    if compared.difference is not None:
        text = number(block, compared.difference, sign=True)
        if compared.low is not None and compared.high is not None:
            text += f" [{number(block, compared.low, sign=True)}, {number(block, compared.high, sign=True)}]"
        line["difference [95 %]"] = Cell(text)
    line["p"] = Cell(compared.words or p_text(compared.p), mark=score.significant and marked == "p")
    line["p Holm"] = Cell(p_text(score.p_holm), mark=score.significant and marked == "p Holm")
    return line


def number(block: Block, value: float, *, sign: bool = False) -> str:
    """A score for people: in percent with one decimal, or as it is with four digits."""
    plus = "+" if sign else ""
    digits = ".1f" if block.scale == "percent" else ".4g"
    return f"{block.factor * value:{plus}{digits}}"


def p_text(p: float | None) -> str:
    """A p-value for people."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
