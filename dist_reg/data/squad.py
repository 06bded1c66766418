"""Questions on passages: SQuAD's json (Rajpurkar et al., 2016 and 2018), or a table with the same columns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from dist_reg.data.files import FORMATS, check_file, read_table, read_text
from dist_reg.data.table import Table, check_text
from dist_reg.errors import UserError

COLUMNS = ("question", "context", "answers")


@dataclass(frozen=True, kw_only=True)
class QAOptions:
    """How long contexts are read. Raises UserError for a number out of range."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    stride: int = 128
    """Tokens of a context that two windows next to each other share."""
    question_length: int = 64
    """Longest question in tokens; longer ones are cut, and counted."""
    answer_length: int = 30
    """Longest answer in tokens that is looked for."""

    def __post_init__(self) -> None:
        for name, least in (("stride", 0), ("question_length", 1), ("answer_length", 1)):
            if getattr(self, name) < least:
                raise UserError(f"data.qa.{name} is {getattr(self, name)}, must be {least} or more")


def read_questions(path: str | Path, *, quoting: bool | None = None) -> Table:
    """The questions of a file, a row each: `question`, `context`, `answers` (texts, none where there is no answer) and `starts`
    (of the answers in the context, in characters).

    Raises:
        UserError: the file is missing, of another format, lacks something, or has an answer that is not in its context.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return _read_json(path)
    if path.suffix.lower() in FORMATS:
        return questions_of(read_table(path, quoting=quoting))
    raise UserError(
        f"{path} has the extension {path.suffix!r}; questions come as SQuAD's .json, or as {', '.join(FORMATS)}"
    )


def questions_of(table: Table) -> Table:
    """As `read_questions`, of a table with `question`, `context` and `answers` = {text: [...], answer_start: [...]}."""
    answers = [_parsed(table, row, value) for row, value in enumerate(table.column("answers"))]
    columns = {"question": table.texts("question"), "context": table.texts("context")}
    return _located(replace(table, columns=columns), answers)


def _parsed(table: Table, row: int, value: Any) -> list[tuple[Any, Any]]:
    """(text, start) of every answer of a row."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    try:
        return list(zip(value["text"], value["answer_start"], strict=True))
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f'{table.where(row)}: the answers are {value!r}, not {{"text": [...], "answer_start": [...]}} with as many of either'
        ) from None


def _read_json(path: Path) -> Table:
    check_file(path)
    try:
        whole = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    rows = list(_rows(path, whole))
    if not rows:
        raise UserError(f"{path} holds no questions")
    table = Table(
        source=str(path),
        columns={"question": [row[1] for row in rows], "context": [row[2] for row in rows]},
        lines=[row[0] for row in rows],
        unit="question",
    )
    return _located(table, [row[3] for row in rows])


def _rows(path: Path, whole: Any) -> Iterator[tuple[str, str, str, list[tuple[Any, Any]]]]:
    """(id, question, context, answers) of every question."""
    where = ""
    try:
        for i, article in enumerate(whole["data"]):
            for j, paragraph in enumerate(article["paragraphs"]):
                where = f"data[{i}].paragraphs[{j}]"
                context = paragraph["context"]
                for k, entry in enumerate(paragraph["qas"]):
                    where = f"data[{i}].paragraphs[{j}].qas[{k}]"
                    answers = [(answer["text"], answer["answer_start"]) for answer in entry["answers"]]
                    impossible = entry.get("is_impossible", False)
                    if not impossible and not answers:
                        raise UserError(
                            f"{path}, {where}: no answer; say is_impossible: true of a question that has none"
                        )
                    if not (isinstance(context, str) and isinstance(entry["question"], str)):
                        raise UserError(f"{path}, {where}: question and context must be texts")
                    yield str(entry["id"]), entry["question"], context, [] if impossible else answers
    except (KeyError, TypeError, AttributeError) as error:
        missing = f"no {error.args[0]!r} there" if isinstance(error, KeyError) else _said(error)
        raise UserError(
            f"{path}, {where or 'its top'}: not SQuAD's json (data, paragraphs, context, qas, id, question, answers): {missing}"
        ) from None


def _said(error: Exception) -> str:
    """What Python says, without its class."""
    return str(error) or type(error).__name__


def _located(table: Table, answers: list[list[tuple[Any, Any]]]) -> Table:
    """`table` with `answers` and `starts`; a start that is off becomes the nearest place where the answer stands.

    `moved` counts, as 0 or 1 a row, the rows for which that was needed.
    """
    texts: list[list[str]] = []
    starts: list[list[int]] = []
    moved: list[int] = []
    for row, found in enumerate(answers):
        context, own, places = table.columns["context"][row], [], []
        for name in ("context", "question"):
            check_text(table.columns[name][row], f"{table.where(row)}, {name}")
        for text, start in found:
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"{table.where(row)}: the answer {text!r} is empty; a question without one has no answers"
                )
            if isinstance(start, bool) or not isinstance(start, int):
                raise UserError(f"{table.where(row)}: answer_start is {start!r}, no place in the context")
            own.append(text)
            places.append(_place(table, row, context, text, start))
        texts.append(own)
        starts.append(places)
        moved.append(int(any(place != start for place, (_, start) in zip(places, found))))
    return replace(table, columns={**table.columns, "answers": texts, "starts": starts, "moved": moved})


def _place(table: Table, row: int, context: str, text: str, start: int) -> int:
    if start >= 0 and context.startswith(text, start):
        return start
    places, place = [], context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    if not places:
        raise UserError(
            f"{table.where(row)}: the answer {text!r} is not in its context; correct it or remove it"
        )
    return min(places, key=lambda found: abs(found - start))
