"""Reading questions: SQuAD's json and tables, answers in their contexts, and the sentence that each broken file gets."""

from __future__ import annotations

import json

import pandas
import pytest

from dist_reg.data.squad import QAOptions, read_questions
from dist_reg.errors import UserError
from tests.data.test_files import write

CONTEXT = "Anna met Ben in Rome. Ben lives in Rome."


def squad(*questions: dict) -> dict:
    return {"version": "v2.0", "data": [{"paragraphs": [{"context": CONTEXT, "qas": list(questions)}]}]}


def question(text="Rome", start=16, **changes) -> dict:
    return {"id": "q1", "question": "where?", "answers": [{"text": text, "answer_start": start}], **changes}


def read(folder, content, name="a file.json"):
    return read_questions(write(folder / name, content if isinstance(content, str) else json.dumps(content)))


def test_json_of_both_versions(tmp_path):
    none = {"id": "q2", "question": "when?", "answers": [], "is_impossible": True, "plausible_answers": [1]}
    table = read(tmp_path, squad(question(), none))
    assert table.columns == {
        "question": ["where?", "when?"],
        "context": [CONTEXT] * 2,
        "answers": [["Rome"], []],
        "starts": [[16], []],
        "moved": [0, 0],
    }
    assert table.where(1).endswith("a file.json, question q2")


def test_tables_have_the_hub_s_columns(tmp_path):
    rows = [
        {"question": "where?", "context": CONTEXT, "answers": {"text": ["Rome", "in Rome"], "answer_start": [16, 13]}},
        {"question": "when?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame([{**row, "answers": json.dumps(row["answers"])} for row in rows]).to_csv(
        tmp_path / "a.csv", index=False
    )
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        table = read_questions(tmp_path / name)
        assert table.columns["answers"] == [["Rome", "in Rome"], []], name
        assert table.columns["starts"] == [[16, 13], []], name


def test_a_start_that_is_off_becomes_the_nearest_place(tmp_path):
    table = read(tmp_path, squad(question(start=18), question(start=34), question(start=-1), question()))
    assert table.columns["starts"] == [[16], [35], [16], [16]]
    assert table.columns["moved"] == [1, 1, 1, 0]


BAD = {
    "answer elsewhere": (squad(question("Paris")), "question q1: the answer 'Paris' is not in its context"),
    "empty answer": (squad(question(" ")), "question q1: the answer ' ' is empty"),
    "no answer": (squad(question(answers=[])), r"data\[0\].paragraphs\[0\].qas\[0\]: no answer; say is_impossible"),
    "no context": ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\]: .* no 'context' there"),
    "no id": (squad({"question": "?", "answers": [{"text": "Rome", "answer_start": 16}]}), "no 'id' there"),
    "start is text": (squad(question(start="16")), "answer_start is '16', no place in the context"),
    "a list": ([1], "its top: not SQuAD's json"),
    "no data": ({}, "its top: not SQuAD's json .* no 'data' there"),
    "no questions": ({"data": []}, "holds no questions"),
    "broken": ("{\n,", "line 2: not valid JSON"),
    "empty": ("", r"is empty \(0 bytes\)"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_broken_files(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_broken_tables(tmp_path):
    rows = '{"question": "where?", "context": "Rome", "answers": {"text": ["Rome"], "answer_start": []}}\n'
    with pytest.raises(UserError, match="line 1: the answers are .* with as many of either"):
        read(tmp_path, rows, "a.jsonl")
    with pytest.raises(UserError, match="has no column 'answers'; did you mean 'answer'"):
        read(tmp_path, "question,context,answer\na,b,c\n", "a.csv")
    with pytest.raises(UserError, match="has the extension '.xml'"):
        read(tmp_path, "<a/>", "a.xml")


def test_options_out_of_range():
    with pytest.raises(UserError, match="data.qa.answer_length is 0, must be 1 or more"):
        QAOptions(answer_length=0)
    with pytest.raises(UserError, match="data.qa.stride is -1, must be 0 or more"):
        QAOptions(stride=-1)
