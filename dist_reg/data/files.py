"""Reading local csv, tsv, jsonl and parquet files, with messages that name the line."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_reg.data.table import Table
from dist_reg.errors import UserError, nearest

logger = logging.getLogger(__name__)

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
_LONGEST_FIELD = 1 << 24  # the csv module refuses fields of more than 131072 characters by default


def read_table(
    path: str | Path,
    *,
    quoting: bool | None = None,
    header: Sequence[str] | None = None,
    file_format: str | None = None,
    skip_bad_rows: bool = False,
) -> Table:
    """Read a data file of one of `FORMATS` (by its extension, unless `file_format` is given).

    Args:
        quoting: whether fields of a csv or tsv file may stand in double quotes; default csv yes, tsv no.
        header: column names of a csv or tsv file that has no header line.
        skip_bad_rows: leave out rows with too few or too many fields, with a warning that counts them.

    Raises:
        UserError: the file is missing, empty, of another format, not UTF-8, or a row does not parse.
    """
    path = Path(path)
    file_format = file_format or path.suffix.lower()
    if file_format not in FORMATS:
        raise UserError(
            f"{path} has the extension {path.suffix!r}, which cannot be read; known: {', '.join(FORMATS)}"
        )
    check_file(path)
    if file_format == ".parquet":
        table = _read_parquet(path)
    elif file_format == ".jsonl":
        table = _read_jsonl(path)
    else:
        quoted = file_format == ".csv" if quoting is None else quoting
        delimiter = "," if file_format == ".csv" else "\t"
        table = _read_delimited(path, delimiter, quoted, header, skip_bad_rows)
    if len(table) == 0:
        raise UserError(f"{path} holds no rows after its header")
    return table


def check_file(path: Path) -> None:
    """Check that `path` is a file with something in it.

    Raises:
        UserError: it is a folder, empty, or absent (names the nearest file).
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it")
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise UserError(f"the file {path} does not exist, nor does its folder {folder}")
        names = sorted(entry.name for entry in folder.iterdir())
        hint = nearest(path.name, names) if names else "the folder is empty"
        raise UserError(f"the file {path} does not exist; {hint}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises UserError naming the line that is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `error.object` rather than `data`: the codec counts positions after the byte order mark
        line = bytes(error.object[: error.start]).count(b"\n") + 1
        byte = error.object[error.start]
        raise UserError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; convert the file to UTF-8"
        ) from None


def _records(
    path: Path, text: str, delimiter: str, quoted: bool
) -> Iterator[tuple[int, list[str]]]:  # (first line of the record, its fields)
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    while True:
        first_line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = (
                "a quoted field is never closed" if "unexpected end of data" in str(error) else str(error)
            )
            fix = (
                "; if quotes are plain characters there, set data.quoting to false"
                if quoted and '"' in text
                else ""
            )
            raise UserError(f"{path}, line {first_line}: {reason}{fix}") from None
        if fields:
            yield first_line, fields


def _read_delimited(
    path: Path, delimiter: str, quoted: bool, header: Sequence[str] | None, skip_bad_rows: bool
) -> Table:
    text = read_text(path)
    records = _records(path, text, delimiter, quoted)
    if header is None:
        header = next(records, (0, []))[1]
        if not header:
            raise UserError(f"{path} is empty: it has no header line")
        for name in header:
            if header.count(name) > 1:
                raise UserError(f"{path}, line 1: the header names column {name!r} twice")
    rows: list[list[str]] = []
    lines: list[int] = []
    skipped = 0
    for line, fields in records:
        if len(fields) == len(header):
            rows.append(fields)
            lines.append(line)
        elif skip_bad_rows:
            skipped += 1
        else:
            raise UserError(_wrong_field_count(path, line, fields, header, quoted))
    if skipped:
        logger.warning("%s: left out %d rows that do not have %d fields", path, skipped, len(header))
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return Table(source=str(path), columns=columns, lines=lines, unit="line")


def _wrong_field_count(path: Path, line: int, fields: list[str], header: Sequence[str], quoted: bool) -> str:
    few_or_many = "too few" if len(fields) < len(header) else "too many"
    message = (
        f"{path}, line {line}: {few_or_many} fields, {len(fields)} where there are {len(header)} columns "
        f"({', '.join(header)})"
    )
    if not quoted and any(field.startswith('"') for field in fields):
        message += "; if double quotes enclose fields in this file, set data.quoting to true"
    return message


def _read_jsonl(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    # split("\n"), not splitlines(): a JSON string may hold U+2028 and its like
    for line, content in enumerate(read_text(path).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno})"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {line}: not a JSON object such as {{"text": ..., "label": ...}}')
        rows.append(row)
        lines.append(line)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(source=str(path), columns=columns, lines=lines, unit="line")


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return Table(source=str(path), columns=table.to_pydict(), lines=range(1, table.num_rows + 1))
