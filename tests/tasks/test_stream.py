"""Streamed training rows: the same as those read at once, every pass in another order, whatever the number of files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from dist_reg.data.config import DataConfig
from dist_reg.data.lm import LMOptions
from dist_reg.errors import UserError
from dist_reg.tasks import load_task
from dist_reg.tasks.stream import PASS
from tests.tasks.test_lm import decoder_tokenizer
from tests.tiny import tokenizer, write_reviews


def write_shards(folder: Path, rows: int = 30, files: int = 3) -> DataConfig:
    for number in range(files):
        each = rows // files
        write_reviews(folder / f"part-{number}.jsonl", each, start=number * each)
    write_reviews(folder / "dev.jsonl", 8, start=rows)
    return DataConfig(data_dir=str(folder), train="part-*.jsonl", dev="dev.jsonl", streaming=True)


def change(config: DataConfig, **fields) -> DataConfig:
    return DataConfig(**{**vars(config), **fields})


def stream(
    config: DataConfig, task="classification", tok=None, buffer: int = 10, seed: int = 0, length: int = 16
):
    tok = tok or tokenizer()
    loaded = load_task(task, config).tokenize(tok, length)
    return loaded, loaded.stream(tok, length, seed=seed, buffer=buffer)


def passes(rows, count: int, number: int) -> list[list[dict]]:
    found = list(itertools.islice(rows, count * number))
    return [found[start : start + count] for start in range(0, count * number, count)]


def test_every_pass_has_every_row_once_in_an_order_of_its_own(tmp_path):
    task, rows = stream(write_shards(tmp_path))
    first, second = passes(rows, 30, 2)
    whole = (tmp_path / "whole.jsonl").open("w")
    for number in range(3):
        whole.write((tmp_path / f"part-{number}.jsonl").read_text())
    whole.close()
    config = change(write_shards(tmp_path), train="whole.jsonl", streaming=False)
    at_once = load_task("classification", config).tokenize(tokenizer(), 16)
    assert sorted(first, key=lambda row: row["example_id"]) == at_once.train.to_list()
    ids = [[row["example_id"] for row in one] for one in (first, second)]
    assert sorted(ids[1]) == [number + (1 << PASS) for number in range(30)]
    assert [number - (1 << PASS) for number in ids[1]] != ids[0] != sorted(ids[0])
    assert rows.counts == {"rows": 30, "rows_left_out": 0, "passes": 1}
    assert task.examples == 30
    assert task.label_names == at_once.label_names


def test_the_order_follows_from_the_seed_alone(tmp_path):
    config = write_shards(tmp_path)
    orders = [
        [row["example_id"] for row in itertools.islice(stream(config, seed=seed)[1], 70)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    one_by_one = [row["example_id"] for row in itertools.islice(stream(config, buffer=1)[1], 30)]
    assert one_by_one == list(range(30))


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_other_files(tmp_path, kind):
    import pandas

    config = write_shards(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "part-0.jsonl").read_text().splitlines()]
    rows[0]["text"], rows[1]["text"] = 'the "film" , NA', "null"
    frame = pandas.DataFrame(rows)
    path = tmp_path / f"a b.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        options = {"sep": "\t", "quoting": 3} if kind == "tsv" else {}
        frame.to_csv(path, index=False, **options)
    config = change(config, train=path.name)
    found = list(itertools.islice(stream(config, buffer=1)[1], 10))
    at_once = load_task("classification", change(config, streaming=False)).tokenize(tokenizer(), 16)
    assert found == at_once.train.to_list()


def test_language_models(tmp_path, caplog):
    pairs = [{"prompt": "the film", "completion": "is good " * (1 + i % 5)} for i in range(40)]
    pairs[7]["prompt"] = "very " * 40  # nothing of its completion fits
    for name, content in (("a", pairs), ("dev", pairs[:3])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    config = DataConfig(data_dir=str(tmp_path), train="a.jsonl", dev="dev.jsonl", streaming=True)
    task, rows = stream(config, "lm", decoder_tokenizer())
    assert len(list(itertools.islice(rows, 39))) == 39
    next(iter(rows))
    assert task.form == "completion"
    next(itertools.islice(rows, 39, None))
    assert rows.counts == {
        "rows": 40, "rows_left_out": 1, "passes": 1, "tokens": 367, "tokens_predicted": 273, "rows_cut": 1,
        "turns_left_out": 0,
    }  # fmt: skip
    assert (
        caplog.text.count(
            "a.jsonl: row 8 has nothing to learn from and is left out; results.json counts them."
        )
        == 3
    )
    assert "a.jsonl, read once: of 40 rows rows_cut 1, rows_left_out 1." in caplog.text
    packed = change(config, lm=LMOptions(packing=True))
    task, rows = stream(packed, "lm", decoder_tokenizer(), length=32)
    at_once = load_task("lm", change(packed, streaming=False)).tokenize(decoder_tokenizer(), 32)
    one = list(itertools.islice(rows, len(at_once.train)))
    assert sorted(one, key=lambda row: row["example_id"]) == at_once.train.to_list()
    assert "row_spans" in task.collator(decoder_tokenizer())(one[:2])


def test_mistakes(tmp_path):
    config = write_shards(tmp_path)
    for task, changes, message in (
        ("sst2", {}, "data.streaming has no use with task sst2; it is for classification, regression, lm"),
        ("classification", {"train": "nothing-*.jsonl"}, "no file matches .*nothing-"),
        ("classification", {"train": "*"}, "files of the sorts"),
        ("classification", {"train": "part-9.jsonl"}, "part-9.jsonl does not exist; did you mean"),
        ("classification", {"train": None}, "data.streaming needs data.train"),
        ("classification", {"dev": None}, "needs data.dev"),
    ):
        (tmp_path / "other.txt").write_text("a")
        with pytest.raises(UserError, match=message):
            load_task(task, change(config, **changes))
    with pytest.raises(UserError, match="data.train_samples needs all rows at once"):
        change(config, train_samples=3)
    with pytest.raises(UserError, match="data.shuffle_buffer has no use without data.streaming"):
        change(config, streaming=False, shuffle_buffer=3)
    with pytest.raises(UserError, match="data.shuffle_buffer is 0"):
        change(config, shuffle_buffer=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": 7}', r"2 files, row 4.* has the label '7', which training does not know"),
        ('{"text": null, "label": 1}', "2 files, row 4: column 'text' is empty"),
        ("{oops", "the stream of .* cannot be read"),
    ],
)
def test_a_bad_row_is_found_when_it_is_read(tmp_path, line, message):
    config = write_shards(tmp_path, rows=6, files=2)
    path = tmp_path / "part-1.jsonl"
    path.write_text(line + "\n" + path.read_text())
    _, rows = stream(config)
    with pytest.raises(UserError, match=message):
        list(itertools.islice(rows, 10))


def test_nothing_to_learn_from(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "very " * 40, "completion": "good"}))
    (tmp_path / "dev.jsonl").write_text(json.dumps({"prompt": "very", "completion": "good"}))
    config = DataConfig(data_dir=str(tmp_path), train="a.jsonl", dev="dev.jsonl", streaming=True)
    _, rows = stream(config, "lm", decoder_tokenizer())
    with pytest.raises(UserError, match="holds no row that can be learnt from"):
        next(iter(rows))
