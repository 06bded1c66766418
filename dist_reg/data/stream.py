"""Training rows that are read while they are needed: files of any size, in one piece or in many."""

from __future__ import annotations

import csv
import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_reg.data.files import check_file
from dist_reg.data.table import Table
from dist_reg.errors import UserError, reason

BUILDERS = {".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""What `datasets` calls the readers of these files."""


@dataclass(frozen=True)
class Source:
    """Rows to be read again and again, and what makes examples of them."""

    name: str
    """Of the files or the data set, for messages."""
    read: Callable[[], Iterator[dict[str, Any]]]
    """All rows from the first one on, in an order that is always the same."""
    prepare: Callable[[Table], dict[str, list[Any]]]
    """The columns that a task encodes, of some rows; raises UserError for one that is wrong."""


def shards(pattern: str, data_dir: str | None) -> list[Path]:
    """The files that `pattern` names, sorted: one, or those that match its `*`, `?` and `[...]`.

    Raises:
        UserError: there is none, one is empty, or they are not of one sort.
    """
    path = Path(data_dir or "").expanduser() / Path(pattern).expanduser()
    if not glob.has_magic(pattern) or path.exists():
        check_file(path)
        files = [path]
    else:
        files = [
            Path(found) for found in sorted(glob.glob(str(path), recursive=True)) if Path(found).is_file()
        ]
        if not files:
            raise UserError(f"data.train: no file matches {path}")
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) > 1 or kinds[0] not in BUILDERS:
        raise UserError(
            f"data.train: {path} names files of the sorts {', '.join(kinds)}; streaming reads one of {', '.join(BUILDERS)}"
        )
    for file in files:
        check_file(file)
    return files


def read_shards(files: list[Path], quoting: bool | None) -> Callable[[], Iterator[dict[str, Any]]]:
    """What reads the rows of `files`, one after the other."""
    suffix = files[0].suffix.lower()
    options: dict[str, Any] = {}
    if suffix in (".csv", ".tsv"):
        quoted = suffix == ".csv" if quoting is None else quoting
        options = {"sep": "," if suffix == ".csv" else "\t", "quoting": 0 if quoted else 3}
        options |= {"keep_default_na": False, "features": _texts(files[0], **options)}

    def read() -> Iterator[dict[str, Any]]:
        from datasets import load_dataset

        names = [str(file) for file in files]
        yield from _told(
            ", ".join(names[:3]),
            lambda: load_dataset(
                BUILDERS[suffix], data_files=names, split="train", streaming=True, **options
            ),
        )

    return read


def _texts(path: Path, sep: str, quoting: Any) -> Any:
    """Every column of a table as text: a label 1 and a sentence "007" stay what they are."""
    from datasets import Features, Value

    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=sep, quoting=quoting), [])
    return Features({name: Value("string") for name in header})


def read_hub_stream(name: str, config: str | None, split: str) -> Callable[[], Iterator[dict[str, Any]]]:
    """What reads the rows of a split of a hub data set; class labels come as names."""

    def read() -> Iterator[dict[str, Any]]:
        from datasets import load_dataset

        yield from _told(name, lambda: load_dataset(name, config, split=split, streaming=True))

    return read


def _told(name: str, load: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """The rows of what `load` returns; whatever `datasets` and its readers raise becomes one sentence."""
    from datasets import ClassLabel

    try:
        rows = load()
        labels = {
            column: feature
            for column, feature in (rows.features or {}).items()
            if isinstance(feature, ClassLabel)
        }
        for row in rows:
            yield {
                column: labels[column].int2str(value) if column in labels and value is not None else value
                for column, value in row.items()
            }
    except Exception as error:  # of a dozen types
        cause = error.__cause__ or error
        raise UserError(f"the stream of {name} cannot be read: {reason(cause)}") from error
