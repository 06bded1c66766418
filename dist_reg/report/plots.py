"""The pictures of a report: figures, and several of them as one picture."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from dist_reg.report.blocks import Block
from dist_reg.report.curves import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_LAYER = re.compile(r"(.+/.+)_(\d+)")
STYLES = ("-", "--", ":", "-.")

LayerCurves = dict[str, dict[str, dict[int, list[float]]]]
"""By metric, group and layer, one value a run."""


def save(figures: list[Figure], path: Path) -> None:
    """Write `figures`, of one width, below each other as one picture.

    One figure of all would do, but the time that its layout takes grows faster than its panels: 40 rows took 38 s.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.image import imsave

    pictures = []
    for figure in figures:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()))
    imsave(path, np.vstack(pictures))


def row_of_panels(title: str, columns: int, height: float, used: int) -> tuple[Figure, list[Axes]]:
    """A titled figure of `columns` panels, of which the first `used` are seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns + 2, height), dpi=130, layout="constrained")
    figure.suptitle(plain(title), fontsize="medium")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in panels[used:]:
        axis.set_visible(False)
    return figure, panels[:used]


def score_figures(blocks: list[Block]) -> list[Figure]:
    """A figure a block, a panel an evaluation set: runs as points, mean and standard deviation as a bar."""
    columns = max(len(block.names) for block in blocks)
    figures = []
    for block in blocks:
        height = 0.55 * len(block.groups) + 1.3
        figure, panels = row_of_panels(block.title, columns, height, len(block.names))
        factor, unit = (100, ", %") if block.scale == "percent" else (1, "")
        for axis, name in zip(panels, block.names):
            for height, group in enumerate(block.groups):
                scores = [factor * score for score in group.scores(name).values()]
                if not scores:
                    continue
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                look = {"color": "0.45", "markersize": 18, "markeredgewidth": 2, "capsize": 4}
                axis.errorbar(statistics.fmean(scores), height, xerr=spread, fmt="|", **look)
                axis.plot(scores, [height] * len(scores), "o", color="tab:blue", markersize=5, alpha=0.8)
            axis.set_ylim(len(block.groups) - 0.5, -0.5)
            axis.set_yticks(range(len(block.groups)), [])
            axis.set_xlabel(plain(f"{block.title_of(name)}: {block.metric}{unit}"))
        panels[0].set_yticklabels([wrapped(group.label, 30) for group in block.groups])
        figures.append(figure)
    return figures


def curve_figures(points: list[Point]) -> list[Figure]:
    """A figure a block, a panel a quantity: means over steps with a band of one standard deviation."""
    found: dict[str, dict[str, dict[str, list[Point]]]] = {}
    for point in points:
        block = found.setdefault(f"{point.task}, {point.model}, {point.examples} examples", {})
        block.setdefault(point.quantity, {}).setdefault(point.methods, []).append(point)
    columns = max(len(quantities) for quantities in found.values())
    figures = []
    for title, quantities in found.items():
        figure, panels = row_of_panels(title, columns, 3.8, len(quantities))
        looks = dict(zip(dict.fromkeys(name for lines in quantities.values() for name in lines), _looks()))
        for axis, (quantity, lines) in zip(panels, quantities.items()):
            for name, line in lines.items():
                steps, means = [point.step for point in line], [point.mean for point in line]
                low = [point.mean - (point.std or 0.0) for point in line]
                high = [point.mean + (point.std or 0.0) for point in line]
                color, style = looks[name]
                axis.plot(steps, means, marker=".", label=wrapped(name, 40), color=color, linestyle=style)
                axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axis.set_xlabel("step")
            axis.set_ylabel(plain(quantity))
        panels[0].legend(fontsize="small")
        figures.append(figure)
    return figures


def _looks() -> Iterator[tuple[str, str]]:
    """Colour and line of one group after the other: ten colours, then the same with another line."""
    return ((f"C{index % 10}", STYLES[index // 10 % len(STYLES)]) for index in count())


def by_layer(blocks: list[Block]) -> LayerCurves:
    """What runs last logged for every layer, such as HIRE's gates."""
    found: LayerCurves = {}
    for block in blocks:
        for group in block.groups:
            name = f"{group.label}, {block.title}"
            for run in group.runs:
                for metric, value in (run.results.get("terms") or {}).items():
                    match = OF_LAYER.fullmatch(metric)
                    if match and math.isfinite(value):
                        curve = found.setdefault(match[1], {}).setdefault(name, {})
                        curve.setdefault(int(match[2]), []).append(value)
    return found


def layer_figures(curves: LayerCurves) -> list[Figure]:
    """A figure a metric, one curve a group: the mean over runs by layer, with the standard deviation as bars."""
    figures = []
    for metric, by_group in curves.items():
        figure, (axis,) = row_of_panels("", 1, 4.2, 1)
        for (name, curve), (color, style) in zip(by_group.items(), _looks()):
            layers = sorted(curve)
            means = [statistics.fmean(curve[layer]) for layer in layers]
            spread = [statistics.stdev(curve[layer]) if len(curve[layer]) > 1 else 0.0 for layer in layers]
            look = {"color": color, "linestyle": style, "marker": "o", "capsize": 3}
            axis.errorbar(layers, means, yerr=spread, label=wrapped(name, 60), **look)
        axis.set_xticks(sorted({layer for curve in by_group.values() for layer in curve}))
        axis.set_xlabel("layer")
        axis.set_ylabel(plain(metric))
        axis.legend(fontsize="small")
        figures.append(figure)
    return figures


def wrapped(label: str, width: int) -> str:
    """`label` in lines of `width` letters."""
    return plain("\n".join(wrap(label, width)))


def plain(text: str) -> str:
    """`text` with its dollar signs as such; a pair of them would be mathematics."""
    return text.replace("$", r"\$")
