"""Rows as they were read, every column a list, with the place of each row for messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dist_reg.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


def check_text(text: str, where: str) -> None:
    """Raise UserError for half a character, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start + 1} is half of one (U+{ord(text[error.start]):04X}), which is no text"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of one data set and where its rows come from."""

    source: str
    """File path or data set name."""
    columns: dict[str, list[Any]]
    """Name to values, all of the same length; a missing value is None."""
    lines: Sequence[int | str]
    """Line of each row in a text file, else its number from 1, or the name it has there."""
    unit: str = "row"
    """What `lines` counts or names: `line`, `row` or `question`."""

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, rows: Sequence[int]) -> Table:
        """The rows of these numbers (from 0), in this order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[row] for row in rows])

    def where(self, index: int) -> str:
        """The place of row `index` (from 0) for a message: `train.csv, line 7`."""
        return f"{self.source}, {self.unit} {self.lines[index]}"

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
            UserError: there is no such column (names the nearest), or a value is missing (names its line).
        """
        if name not in self.columns:
            raise UserError(f"{self.source} has no column {name!r}; {nearest(name, list(self.columns))}")
        values = self.columns[name]
        for index, value in enumerate(values):
            if value is None or value != value:  # parquet spells a missing value as NaN
                raise UserError(f"{self.where(index)}: column {name!r} is empty")
        return values

    def texts(self, name: str) -> list[str]:
        """A column of strings; an empty string is allowed, for GLUE has some.

        Raises:
            UserError: as `column`, or a value is not a string.
        """
        values = self.column(name)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise UserError(
                    f"{self.where(index)}: column {name!r} holds {value!r}, which is no text; "
                    "name the column with the text under data.text"
                )
            check_text(value, f"{self.where(index)}, column {name!r}")
        return values

    def labels(self, name: str) -> list[Any]:
        """A column without empty values: as `column`, and blank strings are errors too.

        Raises:
            UserError: as `column`, or a blank label.
        """
        values = self.column(name)
        for index, value in enumerate(values):
            if isinstance(value, str) and not value.strip():
                raise UserError(f"{self.where(index)}: the label (column {name!r}) is empty")
        return values

    def select(self, text: str, text_pair: str | None, label: str) -> Table:
        """The columns of a sequence task under the names `text`, `text_pair` (for pairs) and `label`.

        Raises:
            UserError: as `texts` and `labels`.
        """
        columns = {"text": self.texts(text), "label": self.labels(label)}
        if text_pair is not None:
            columns["text_pair"] = self.texts(text_pair)
        return replace(self, columns=columns)

    def dataset(self) -> Dataset:
        """The columns as a `datasets.Dataset`."""
        from datasets import Dataset

        return Dataset.from_dict(self.columns)
