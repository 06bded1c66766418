"""The pictures of a report: figures, and several of them as one picture."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

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
        for axis, name in zip(panels, block.names):
            for height, group in enumerate(block.groups):
                scores = [block.factor * score for score in group.scores(name).values()]
                if not scores:
                    continue
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                look = {"color": "0.45", "markersize": 18, "markeredgewidth": 2, "capsize": 4}
                axis.errorbar(statistics.fmean(scores), height, xerr=spread, fmt="|", **look)
                axis.plot(scores, [height] * len(scores), "o", color="tab:blue", markersize=5, alpha=0.8)
            axis.set_ylim(len(block.groups) - 0.5, -0.5)
            axis.set_yticks(range(len(block.groups)), [])
            axis.set_xlabel(plain(block.axis_of(name)))
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
                axis.plot(steps, means, marker=".", label=wrapped(name, 60), color=color, linestyle=style)
                axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axis.set_xlabel("step")
            axis.set_ylabel(plain(quantity))
        legend_below(figure, panels)
        figures.append(figure)
    return figures


def example_figures(blocks: list[Block]) -> list[Figure]:
    """A figure a task that was trained on several numbers of examples, a panel an evaluation set.

    Means over seeds by the number of examples, with the standard deviation as bars.
    """
    tasks: dict[tuple[str, str, str], list[Block]] = {}
    for block in blocks:
        tasks.setdefault((block.task, block.model, block.metric), []).append(block)
    found = {key: sizes for key, sizes in tasks.items() if len({block.train_examples for block in sizes}) > 1}
    names = {
        key: list(dict.fromkeys(n for block in sizes for n in block.names)) for key, sizes in found.items()
    }
    columns = max(map(len, names.values()), default=0)
    figures = []
    for (task, model, metric), sizes in found.items():
        key = (task, model, metric)
        sizes = sorted(sizes, key=lambda block: block.train_examples)
        figure, panels = row_of_panels(f"{task}, {model}", columns, 4.2, len(names[key]))
        looks = dict(zip(dict.fromkeys(group.label for block in sizes for group in block.groups), _looks()))
        for axis, name in zip(panels, names[key]):
            for label, (color, style) in looks.items():
                curve = {
                    block.train_examples: [block.factor * score for score in group.scores(name).values()]
                    for block in sizes
                    for group in block.groups
                    if group.label == label and group.scores(name)
                }
                draw_curve(axis, curve, label=wrapped(label, 60), color=color, linestyle=style)
            axis.set_xscale("log")
            ticks = [block.train_examples for block in sizes]
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.set_xlabel("training examples")
            block = next(block for block in sizes if name in block.names)
            axis.set_ylabel(plain(block.axis_of(name)))
        legend_below(figure, panels)
        figures.append(figure)
    return figures


def draw_curve(axis: Axes, curve: dict[int, list[float]], **look: Any) -> None:
    """The mean of the values at each place, with their standard deviation as bars."""
    if not curve:
        return
    places = sorted(curve)
    means = [statistics.fmean(curve[place]) for place in places]
    spread = [statistics.stdev(curve[place]) if len(curve[place]) > 1 else 0.0 for place in places]
    axis.errorbar(places, means, yerr=spread, marker="o", capsize=3, **look)


def legend_below(figure: Figure, panels: list[Axes]) -> None:
    """One legend of all panels, where it hides none of them; the figure grows by it."""
    shown = {
        label: handle
        for axis in panels
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.set_figheight(figure.get_figheight() + 0.2 * sum(label.count("\n") + 1 for label in shown))
    figure.legend([*shown.values()], [*shown], loc="outside lower center", fontsize="small")


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
            draw_curve(axis, curve, label=wrapped(name, 80), color=color, linestyle=style)
        axis.set_xticks(sorted({layer for curve in by_group.values() for layer in curve}))
        axis.set_xlabel("layer")
        axis.set_ylabel(plain(metric))
        legend_below(figure, [axis])
        figures.append(figure)
    return figures


def wrapped(label: str, width: int) -> str:
    """`label` in lines of `width` letters."""
    return plain("\n".join(wrap(label, width)))


def plain(text: str) -> str:
    """`text` with its dollar signs as such; a pair of them would be mathematics."""
    return text.replace("$", r"\$")
