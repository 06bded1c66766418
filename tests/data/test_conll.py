"""Reading CoNLL-style files: sentences, columns, comments, and the sentence that each broken file gets."""

from __future__ import annotations

import pytest

from dist_reg.data.conll import read_conll
from dist_reg.errors import UserError
from tests.data.test_files import write

SENTENCES = {
    "tokens": [["EU", "rejects"], ["#", "Peter"]],
    "tags": [["B-ORG", "O"], ["O", "B-PER"]],
}


@pytest.mark.parametrize(
    "content",
    [
        "EU\tB-ORG\nrejects\tO\n\n#\tO\nPeter\tB-PER\n",
        "EU B-ORG\nrejects O\n\n# O\nPeter B-PER",
        "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n-DOCSTART- -X- O\n# SYM O\nPeter  NNP B-PER\n\n",
        "\ufeffEU\tB-ORG\r\nrejects\tO\r\n\t\r\n# a comment\r\n#\tO\r\nPeter\tB-PER\r\n",
    ],
    ids=["tabs", "spaces", "three columns", "windows"],
)
def test_sentences(tmp_path, content):
    table = read_conll(write(tmp_path / "a file.conll", content))
    assert table.columns == SENTENCES


def test_lines_are_those_of_the_first_tokens_and_a_column_can_be_named(tmp_path):
    path = write(tmp_path / "a.txt", "-DOCSTART- X O\n\nEU NNP B-ORG\n\nhe PRP O\nran VBD O\n")
    table = read_conll(path, column=2)
    assert table.columns["tags"] == [["NNP"], ["PRP", "VBD"]]
    assert table.where(1) == f"{path}, line 5"


ERRORS = [
    ("", "is empty"),
    ("\n\n", "holds no sentence"),
    ("EU\tB-ORG\nrejects\n", r"line 2: 1 columns where 2 were expected"),
    ("EU\n", r"line 1: 1 columns where two or more were expected"),
    ("EU\tB-ORG\n\tO\n", r"line 2: the token \(the first column\) is empty"),
    ("EU B-ORG\nrejects the O\n", r"line 2: 3 columns where 2 were expected"),
    (b"EU\tB-ORG\n\xff\tO\n", r"line 2: byte 0xff is not UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), ERRORS, ids=[message[:30] for _, message in ERRORS])
def test_errors_name_the_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_conll(write(tmp_path / "a.conll", content))


def test_blanks_of_another_kind_belong_to_a_token(tmp_path):
    table = read_conll(write(tmp_path / "a.conll", "a\u00a0b O\n"))
    assert table.columns["tokens"] == [["a\u00a0b"]]


def test_a_column_that_is_not_there(tmp_path):
    path = write(tmp_path / "a.conll", "EU\tB-ORG\n")
    with pytest.raises(UserError, match=r"data.label is column 3; .* has tags in columns 2 to 2"):
        read_conll(path, column=3)
