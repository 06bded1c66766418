"""Reading files: what comes out, and the sentence that each broken file gets."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from dist_reg.data.files import read_table
from dist_reg.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_all_formats_give_the_same_rows(tmp_path):
    rows = {"text": ["one, two", 'a "quoted" word'], "label": ["no", "yes"]}
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t", quoting=3)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        table = read_table(tmp_path / name)
        assert table.columns == rows, name
        assert table.dataset().to_dict() == rows


def test_path_with_spaces_and_byte_order_mark_and_crlf(tmp_path):
    path = write(tmp_path / "my data" / "a file.csv", b"\xef\xbb\xbftext,label\r\nfine,1\r\n\r\n")
    assert read_table(path).columns == {"text": ["fine"], "label": ["1"]}


def test_quoted_fields_may_span_lines_and_lines_count_from_their_start(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"one\n\ttwo"\t1\n"three"\t0\n')
    table = read_table(path, quoting=True)
    assert table.columns["text"] == ["one\n\ttwo", "three"]
    assert list(table.lines) == [2, 4]


def test_tsv_is_read_without_quoting(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"open quote\t1\nnext "\t0\n')
    assert read_table(path).columns["text"] == ['"open quote', 'next "']


def test_file_without_header(tmp_path):
    path = write(tmp_path / "a.tsv", "x\t1\ny\t0\n")
    assert read_table(path, header=("text", "label")).columns == {"text": ["x", "y"], "label": ["1", "0"]}


def test_long_field_and_line_separator_inside_text(tmp_path):
    long = "word " * 40_000
    assert read_table(write(tmp_path / "a.csv", f"text,label\n{long},1\n")).columns["text"] == [long]
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b", "label": 1}\n')
    assert read_table(path).columns["text"] == ["a\u2028b"]


def test_torn_rows_can_be_left_out(tmp_path, caplog):
    path = write(tmp_path / "a.tsv", "text\tlabel\nfine\t1\ntorn\nfine too\t0\n")
    assert read_table(path, skip_bad_rows=True).columns["text"] == ["fine", "fine too"]
    assert "left out 1 rows" in caplog.text


BROKEN = {
    "empty": ("a.csv", "", r"a\.csv is empty \(0 bytes\)"),
    "blank": ("a.csv", "\n\n", r"a\.csv is empty: it has no header line"),
    "header only": ("a.csv", "text,label\n", r"a\.csv holds no rows after its header"),
    "no rows": ("a.jsonl", "\n", r"a\.jsonl holds no rows"),
    "column twice": ("a.csv", "text,text\nx,y\n", r"line 1: the header names column 'text' twice"),
    "too many": (
        "a.csv",
        "text,label\nx,1\na, b,1\n",
        r"a\.csv, line 3: too many fields, 3 where there are 2 columns \(text, label\)",
    ),
    "too few": ("a.tsv", "text\tlabel\nx\n", r"line 2: too few fields, 1 where there are 2"),
    "quoted tsv": ("a.tsv", 'text\tlabel\n"x\n\ty"\t1\n', r"line 2: too few .*set data.quoting to true"),
    "open quote": (
        "a.csv",
        'text,label\nx,1\n"y,1\nz,1\n',
        r"line 3: a quoted field is never closed; .*set data.quoting to false",
    ),
    "bad json": (
        "a.jsonl",
        '{"text": "x"}\n{"text": \n',
        r"line 2: not valid JSON \(Expecting value, column",
    ),
    "json list": ("a.jsonl", "[1]\n", r"line 1: not a JSON object"),
    "latin-1": ("a.csv", b"text,label\nx,1\ncaf\xe9,1\n", r"line 3: byte 0xe9 is not UTF-8"),
    "latin-1 after mark": ("a.csv", b"\xef\xbb\xbftext,label\n\xe9,1\n", r"line 2: byte 0xe9 is not UTF-8"),
    "extension": ("a.xlsx", "x", r"extension '\.xlsx', which cannot be read; known: \.csv, \.tsv"),
    "not parquet": ("a.parquet", "text", r"a\.parquet cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(tmp_path, name):
    file, content, message = BROKEN[name]
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path / file, content))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.csv", "text,label\nx,1\n")
    with pytest.raises(UserError, match=r"trian\.csv does not exist; did you mean 'train\.csv'\?"):
        read_table(tmp_path / "trian.csv")
    with pytest.raises(UserError, match="nor does its folder"):
        read_table(tmp_path / "nowhere" / "train.csv")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="does not exist; the folder is empty"):
        read_table(tmp_path / "void" / "train.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path / "folder.csv")


def test_absent_column_and_empty_values(tmp_path):
    table = read_table(write(tmp_path / "a.csv", "sentence,label\nx,1\ny, \n"))
    with pytest.raises(UserError, match=r"a\.csv has no column 'sentense'; did you mean 'sentence'\?"):
        table.texts("sentense")
    with pytest.raises(UserError, match=r"a\.csv, line 3: the label \(column 'label'\) is empty"):
        table.labels("label")
    rows = read_table(write(tmp_path / "a.jsonl", '{"text": "x", "label": 1}\n\n{"text": 3}\n'))
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: column 'label' is empty"):
        rows.labels("label")
    with pytest.raises(UserError, match=r"line 3: column 'text' holds 3, which is no text"):
        rows.texts("text")
    frame = pandas.DataFrame({"text": ["x", "y"], "label": [1.0, float("nan")]})
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: column 'label' is empty"):
        read_table(tmp_path / "a.parquet").labels("label")
