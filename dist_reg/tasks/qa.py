"""Extractive question answering: the span of a context that answers a question, or that there is none."""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dist_reg.data.sampling import sample_rows
from dist_reg.data.squad import QAOptions
from dist_reg.data.table import Table
from dist_reg.errors import UserError
from dist_reg.tasks.base import EXAMPLE_ID, Task
from dist_reg.tasks.collator import Collator
from dist_reg.tasks.metrics import check_finite
from dist_reg.tasks.squad_scores import squad_scores

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OUTSIDE = -1
"""The offset of a token that is not in the context."""
NOT_THE_FIRST_WINDOW = 32
"""Window w of a question has the example id question + (w << 32): each window has noise of its own."""


@dataclass(frozen=True, kw_only=True)
class QATask(Task):
    """A task of kind `qa`.

    Data sets have the columns `question`, `context`, `answers` (texts, none for an unanswerable question), `starts` (their
    places) and `example_id`. Tokenized ones have a row for every window of a context: the model's inputs, `start_positions` and
    `end_positions` (tokens of the first answer, those of `none` where the window does not hold it), `none` (the token that
    stands for no answer), `token_starts` and `token_ends` (characters of the context, -1 outside it), `row` (the question's
    number), `context` and `answers`.
    """

    options: QAOptions
    unanswerable: bool
    """Whether training has questions without an answer, so that the model may say so."""

    model_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    default_length: ClassVar[int] = 384

    def model_kwargs(self) -> dict[str, Any]:
        """`num_labels`: a head with two outputs, start and end."""
        return {"num_labels": 2}

    def encoding(self) -> Any:
        return asdict(self.options)

    def encode(
        self, rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list[Any]]:
        """Windows of at most `max_length` tokens, each with the whole question.

        Raises:
            UserError: a tokenizer without offsets, or a window that has no room for more than what it shares with the next.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"task {self.name} needs a fast tokenizer, which knows the characters of every token; "
                f"{type(tokenizer).__name__} does not."
            )
        questions, longest, cut = _short_questions(rows["question"], tokenizer, self.options.question_length)
        room = max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= self.options.stride:
            raise UserError(
                f"data.max_length {max_length} leaves {room} tokens of context beside a question of {longest}, and data.qa.stride "
                f"shares {self.options.stride} of them; raise the one or lower the other."
            )
        found = tokenizer(
            questions,
            rows["context"],
            truncation="only_second",
            max_length=max_length,
            stride=self.options.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        of_window: list[int] = found.pop("overflow_to_sample_mapping")
        offsets: Any = found.pop("offset_mapping")
        columns: dict[str, list[Any]] = {name: [] for name in _WINDOW}
        window = 0
        for index, row in enumerate(of_window):
            window = window + 1 if index and of_window[index - 1] == row else 0
            inside = [part == 1 for part in found.sequence_ids(index)]
            starts = [start if own else OUTSIDE for own, (start, _) in zip(inside, offsets[index])]
            ends = [end if own else OUTSIDE for own, (_, end) in zip(inside, offsets[index])]
            none = _none_token(found["input_ids"][index], tokenizer.cls_token_id)
            answers, places = rows["answers"][row], rows["starts"][row]
            span = None
            if answers:
                first = inside.index(True) if True in inside else 0
                span = _tokens_of(places[0], places[0] + len(answers[0]), starts, ends, first, sum(inside))
            values = (
                none if span is None else span[0],
                none if span is None else span[1],
                none,
                starts,
                ends,
                rows[EXAMPLE_ID][row],
                rows["context"][row],
                answers,
                rows["moved"][row],
                cut[row],
                int(span is not None),
                rows[EXAMPLE_ID][row] + (window << NOT_THE_FIRST_WINDOW),
            )
            for name, value in zip(_WINDOW, values, strict=True):
                columns[name].append(value)
        return {**found, **columns}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """A `Collator` that pads behind the context, so that positions stay what they are, and always to the longest window.

        These models' losses have padding among the places of an answer, so that it may not depend on how a batch is cut.
        """
        longest = max(
            max(map(len, rows["input_ids"])) for rows in (self.train, *self.evaluation_sets.values())
        )
        return Collator(tokenizer=tokenizer, padding_side="right", length=longest)

    def count(self, name: str, encoded: Dataset) -> dict[str, int]:
        """Questions and their windows; questions that were cut, and those whose answer no window holds whole."""
        rows = encoded["row"]
        answerable, held, cut, moved = (
            {row for row, holds in zip(rows, encoded[column]) if holds}
            for column in ("answers", "holds_answer", "question_cut", "moved")
        )
        lost = len(answerable - held)
        if moved:
            logger.warning(
                "%s: the answers of %d questions are not where answer_start says; the nearest place where they stand is taken.",
                name,
                len(moved),
            )
        if cut:
            logger.warning(
                "%s: %d questions are longer than data.qa.question_length (%d tokens) and are cut.",
                name,
                len(cut),
                self.options.question_length,
            )
        if lost:
            logger.warning(
                "%s: of %d questions no window holds the whole answer; training takes them for unanswerable. Raise data.qa.stride.",
                name,
                lost,
            )
        return {
            "rows": len(set(rows)),
            "windows": len(encoded),
            "unanswerable": len(set(rows) - answerable),
            "questions_cut": len(cut),
            "answers_in_no_window": lost,
            "answers_moved": len(moved),
        }

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Start and end logits [B, T] each."""
        start, end = logits[:2]
        for own in (start, end):
            check_finite(own)
        return start.float(), end.float()

    def compute_metrics(self, predictions: Any, labels: Any, rows: Dataset) -> dict[str, float]:
        """Official scores over the questions whose windows are `rows` (tokenized), from their start and end logits [N, T]."""
        if len(rows) == 0:
            raise UserError("the evaluation set is empty: no metric is defined")
        starts, ends = predictions[:2]
        if not len(starts) == len(ends) == len(rows):
            raise ValueError(f"{len(starts)} rows of predictions, but {len(rows)} rows")
        found = self.answers(starts, ends, rows)
        wanted = dict(zip(rows["row"], rows["answers"]))
        return squad_scores([found[row] for row in wanted], list(wanted.values()))

    def answers(self, starts: np.ndarray, ends: np.ndarray, rows: Dataset) -> dict[int, str]:
        """The answer to every question by its number: the best span of all its windows; "" for none.

        A span is scored by start plus end logit; none by the least such sum of a window's `none` token, as in BERT's code for
        SQuAD 2.0, and only where training has unanswerable questions.
        """
        best: dict[int, tuple[float, str]] = {}
        nothing: dict[int, float] = {}
        columns = ("row", "context", "none", "token_starts", "token_ends")
        for index, (row, context, none, first, last) in enumerate(zip(*(rows[name] for name in columns))):
            start, end = starts[index][: len(first)], ends[index][: len(first)]
            score, i, j = best_span(start, end, np.array(first) != OUTSIDE, self.options.answer_length)
            if row not in best or score > best[row][0]:
                best[row] = score, context[first[i] : last[j]].strip() if np.isfinite(score) else ""
            nothing[row] = min(nothing.get(row, np.inf), float(start[none] + end[none]))
        return {
            row: "" if self.unanswerable and nothing[row] > score else answer
            for row, (score, answer) in best.items()
        }


_WINDOW = (
    "start_positions", "end_positions", "none", "token_starts", "token_ends", "row", "context", "answers", "moved",
    "question_cut", "holds_answer", EXAMPLE_ID,
)  # fmt: skip


def _short_questions(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[str], int, list[int]]:
    """Questions of at most about `limit` tokens, the number of tokens of the longest, and whether each one was cut."""
    found: Any = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)
    short, cut, longest = [], [], 0
    for question, ids, offsets in zip(questions, found["input_ids"], found["offset_mapping"], strict=True):
        too_long, length = len(ids) > limit, len(ids)
        if too_long:
            question = question[: offsets[limit - 1][1]]
            length = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        short.append(question)
        cut.append(int(too_long))
        longest = max(longest, length)
    return short, longest, cut


def _none_token(ids: Sequence[int], cls: int | None) -> int:
    return ids.index(cls) if cls in ids else 0


def _tokens_of(
    start: int, end: int, starts: Sequence[int], ends: Sequence[int], first: int, count: int
) -> tuple[int, int] | None:
    """The first and the last token of the characters [start, end), or None where the window does not hold them all.

    Tokens of the context are `count` from `first` on.
    """
    last = first + count
    if not count or starts[first] > start or ends[last - 1] < end:
        return None
    # a character of several bytes may be several tokens with the same offsets: all of them are meant
    i = bisect_right(ends, start, first, last)
    j = bisect_left(starts, end, first, last) - 1
    return i, max(i, j)


def best_span(
    start: np.ndarray, end: np.ndarray, allowed: np.ndarray, longest: int
) -> tuple[float, int, int]:
    """(score, first token, last token) of the span of at most `longest` tokens with the largest start + end logit.

    Args:
        start: and `end`, logits [T].
        allowed: bool [T], the tokens an answer may begin and end with.
    """
    length = min(longest, len(start))
    begin = np.where(allowed, start, -np.inf)
    finish = np.concatenate((np.where(allowed, end, -np.inf), np.full(length - 1, -np.inf)))
    scores = begin[:, None] + np.lib.stride_tricks.sliding_window_view(finish, length)
    i, more = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[i, more]), int(i), int(i + more)


def make_dataset(table: Table, *, samples: int | None = None, seed: int = 0) -> Dataset:
    """The data set of a QA task from its questions, or a sample of it, stratified by whether there is an answer.

    Raises:
        UserError: a sample that cannot be drawn.
    """
    from datasets import Dataset, Features, List, Value

    rows: Sequence[int] = range(len(table))
    if samples is not None:
        strata = [bool(answers) for answers in table.columns["answers"]]
        rows = sample_rows(strata, samples, seed=seed, name=table.source)
    columns: dict[str, list[Any]] = {
        name: [table.columns[name][row] for row in rows]
        for name in ("question", "context", "answers", "starts", "moved")
    }
    features = Features(
        {
            "question": Value("string"),
            "context": Value("string"),
            "answers": List(Value("string")),
            "starts": List(Value("int64")),
            "moved": Value("int64"),
            EXAMPLE_ID: Value("int64"),
        }
    )
    return Dataset.from_dict({**columns, EXAMPLE_ID: list(rows)}, features=features)
