"""From labels as files spell them to class ids and scores."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dist_reg.data.table import Table
from dist_reg.errors import UserError, nearest


def label_text(label: Any) -> str:
    """A label as text; 1, 1.0 and "1 " are the same."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def find_label_names(table: Table) -> tuple[str, ...]:
    """The labels of a training table (column `label`), by value if all are integers, else by name.

    Raises:
        UserError: one label only, or so many that the column looks like numbers or texts.
    """
    labels = {label_text(label) for label in table.labels("label")}
    if len(labels) == 1:
        raise UserError(
            f"{table.source}: every row has the label {labels.pop()!r}; training needs two or more"
        )
    if len(labels) > max(20, len(table) // 2):
        raise UserError(
            f"{table.source}: {len(labels)} different labels in {len(table)} rows; for scores use task "
            "regression, else name the label column under data.label"
        )
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def class_ids(
    table: Table,
    label_names: tuple[str, ...],
    *,
    set_name: str,
    ids_allowed: bool = False,
    label_map: Mapping[str, str] | None = None,
) -> list[int]:
    """The class id of each row (column `label`).

    Args:
        set_name: `train`, `dev` or the evaluation set's name, for messages.
        ids_allowed: whether a label may also be given as the id of its class, as GLUE's files do.
        label_map: from this table's labels to `label_names`; labels not in it stay as they are.

    Raises:
        UserError: a label that is not among `label_names`, or a `label_map` that names unknown labels.
    """
    ids = {name: i for i, name in enumerate(label_names)}
    if ids_allowed:
        ids = {str(i): i for i in range(len(label_names))} | ids
    labels = [label_text(label) for label in table.labels("label")]
    if label_map:
        _check_label_map(label_map, set_name, set(labels), ids)
        labels = [label_map.get(label, label) for label in labels]
    for index, label in enumerate(labels):
        if label not in ids:
            known = ", ".join(label_names)
            raise UserError(
                f"set {set_name!r} ({table.where(index)}) has the label {label!r}, which training does not "
                f"know (known: {known}); correct it, or map it with an evaluation set's label_map"
            )
    return [ids[label] for label in labels]


def merged_ids(
    table: Table,
    label_names: tuple[str, ...],
    prediction_map: Mapping[str, str],
    *,
    set_name: str,
    label_map: Mapping[str, str] | None = None,
) -> tuple[list[int], tuple[int, ...]]:
    """The class of each row of a set with fewer labels than training, and the class that each class of training counts as.

    A label of the set is stood for by the first class of training that `prediction_map` maps to it.

    Raises:
        UserError: a class of training that the map leaves out, or a label that it maps nothing to.
    """
    where = f"data.eval.{set_name}.prediction_map"
    for name in label_names:
        if name not in prediction_map:
            raise UserError(
                f"{where} leaves out {name!r}; it needs every label of training: {', '.join(label_names)}"
            )
    for name in prediction_map:
        if name not in label_names:
            raise UserError(f"{where} names {name!r}, no label of training; {nearest(name, label_names)}")
    first: dict[str, int] = {}
    for i, name in enumerate(label_names):
        first.setdefault(prediction_map[name], i)
    renamed = label_map or {}
    labels = [label_text(label) for label in table.labels("label")]
    for old in renamed:
        if old not in labels:
            raise UserError(
                f"data.eval.{set_name}.label_map names {old!r}, no label of that set; {nearest(old, sorted(set(labels)))}"
            )
    ids = []
    for row, label in enumerate(labels):
        own = renamed.get(label, label)
        if own not in first:
            raise UserError(
                f"set {set_name!r} ({table.where(row)}) has the label {own!r}, to which {where} maps nothing; "
                f"{nearest(own, list(first))}"
            )
        ids.append(first[own])
    return ids, tuple(first[prediction_map[name]] for name in label_names)


def _check_label_map(
    label_map: Mapping[str, str], set_name: str, labels: set[str], ids: Mapping[str, int]
) -> None:
    for old, new in label_map.items():
        where = f"data.eval.{set_name}.label_map"
        if old not in labels:
            raise UserError(f"{where} names {old!r}, no label of that set; {nearest(old, sorted(labels))}")
        if new not in ids:
            raise UserError(
                f"{where} maps {old!r} to {new!r}, no label of training; {nearest(new, list(ids))}"
            )


def scores(table: Table) -> list[float]:
    """The label of each row as a finite number.

    Raises:
        UserError: a label that is no number, with its line.
    """
    result = []
    for index, label in enumerate(table.labels("label")):
        try:
            score = float(label)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score) or isinstance(label, bool):
            raise UserError(f"{table.where(index)}: the label {label!r} is no number, which regression needs")
        result.append(score)
    return result
