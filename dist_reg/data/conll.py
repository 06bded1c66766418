"""Reading CoNLL-style files: a token a line with its tags in columns, an empty line between sentences."""

from __future__ import annotations

import re
from pathlib import Path

from dist_reg.data.files import check_file, read_text
from dist_reg.data.table import Table
from dist_reg.errors import UserError

DOCUMENT = "-DOCSTART-"
_BLANKS = re.compile(" +")  # a token may hold a blank of another kind


def read_conll(path: str | Path, column: int | None = None) -> Table:
    """The sentences of a file, a row each: `tokens` and `tags` (lists of strings), from the first and the last column.

    Columns stand apart by tabs where the file has any, else by spaces. Lines that begin with -DOCSTART- are left out, and in a
    file with tabs also comments: lines without one that begin with #.

    Args:
        column: number of the column with the tags, from 1; the last one if not given.

    Raises:
        UserError: the file is missing, empty, not UTF-8, holds no sentence, or a line lacks the column.
    """
    path = Path(path)
    check_file(path)
    text = read_text(path)
    separator = "\t" if "\t" in text else None
    rows: list[tuple[list[str], list[str]]] = []
    lines: list[int] = []
    tokens: list[str] = []
    tags: list[str] = []
    columns = 0
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if separator and line.startswith("#") and separator not in line:
            continue
        if not line.strip() or line.startswith(DOCUMENT):
            tokens, tags = [], []
            continue
        fields = (
            [field.strip() for field in line.split(separator)]
            if separator
            else _BLANKS.split(line.strip(" "))
        )
        if not fields[0]:
            raise UserError(f"{path}, line {number}: the token (the first column) is empty")
        columns = columns or len(fields)
        if len(fields) != columns or columns < 2:
            raise UserError(
                f"{path}, line {number}: {len(fields)} columns where {'two or more' if columns < 2 else columns} were "
                "expected, a token and its tag"
            )
        if column is not None and not 2 <= column <= columns:
            raise UserError(f"data.label is column {column}; {path} has tags in columns 2 to {columns}")
        if not tokens:
            rows.append((tokens, tags))
            lines.append(number)
        tokens.append(fields[0])
        tags.append(fields[(column or columns) - 1])
    if not rows:
        raise UserError(f"{path} holds no sentence")
    found = {"tokens": [own for own, _ in rows], "tags": [own for _, own in rows]}
    return Table(source=str(path), columns=found, lines=lines, unit="line")
