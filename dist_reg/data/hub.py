"""Data sets of the Hugging Face hub, by name."""

from __future__ import annotations

from dist_reg.data.table import Table
from dist_reg.errors import UserError, nearest


def read_hub(name: str, config: str | None, split: str, *, instead: str) -> Table:
    """Load one split of a hub data set through `datasets.load_dataset`; class labels, and lists of them, come as names.

    Args:
        instead: what the message recommends where the hub cannot be reached, e.g. "give data.data_dir".

    Raises:
        UserError: the hub cannot be reached, or has no such data set or split.
    """
    from datasets import ClassLabel, load_dataset

    label = name if config is None else f"{name} ({config})"
    try:
        splits = load_dataset(name, config)
    except Exception as error:  # from offline mode to HTTP status: a dozen types of three libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the hub data set {label} cannot be loaded: {reason}; {instead}") from error
    if split not in splits:
        raise UserError(
            f"the hub data set {label} has no split {split!r}; {nearest(split, [str(name) for name in splits])}"
        )
    data = splits[split]
    columns = {column: list(data[column]) for column in data.column_names}
    for column, feature in data.features.items():
        if isinstance(feature, ClassLabel):
            # -1 marks an unlabelled row there
            columns[column] = [None if i is None or i < 0 else feature.int2str(i) for i in columns[column]]
        inner = getattr(feature, "feature", None)
        if isinstance(inner, ClassLabel):
            columns[column] = [
                None if ids is None else [None if i is None or i < 0 else inner.int2str(i) for i in ids]
                for ids in columns[column]
            ]
    return Table(source=f"{label}, split {split}", columns=columns, lines=range(1, len(data) + 1))
