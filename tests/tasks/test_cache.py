"""Tokenized rows on disk: found again by content alone, whole or absent, and never a reason to fail."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from dist_reg.data.config import DataConfig
from dist_reg.tasks import cache, load_task
from dist_reg.tasks.qa import QATask
from dist_reg.tasks.sequence import SequenceTask
from tests.tasks.test_qa import files
from tests.tiny import tokenizer


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Every row is worth keeping, in a folder of the test's; returns the rows that were tokenized."""
    monkeypatch.setenv("DIST_REG_CACHE", str(tmp_path / "a cache"))
    monkeypatch.setattr(cache, "WORTH_KEEPING", -1.0)
    counts: list[int] = []
    encode = SequenceTask.encode

    def counting(self, rows, *args):
        counts.append(len(rows["text"]))
        return encode(self, rows, *args)

    monkeypatch.setattr(SequenceTask, "encode", counting)
    return counts


def demo(**fields):
    return load_task("demo", DataConfig(train_samples=20, dev_samples=10, **fields))


def test_a_second_run_tokenizes_nothing(counted):
    first = demo().tokenize(tokenizer(), 16)
    assert counted == [20, 10, 300]
    second = demo().tokenize(tokenizer(), 16)
    assert counted == [20, 10, 300]
    for name, rows in {"train": first.train, **first.evaluation_sets}.items():
        again = second.train if name == "train" else second.evaluation_sets[name]
        assert again.to_dict() == rows.to_dict()
        assert again.features == rows.features
    assert first.counts == second.counts


def test_whatever_changes_the_rows_makes_them_anew(counted, monkeypatch):
    demo().tokenize(tokenizer(), 16)
    demo().tokenize(tokenizer(), 12)  # another length
    assert len(counted) == 6
    demo(seed=1).tokenize(tokenizer(), 16)  # other rows; the set that is no sample is the same
    assert counted[6:] == [20, 10]
    other = tokenizer()
    other.add_tokens(["gadget"])
    demo().tokenize(other, 16)
    assert len(counted) == 11
    monkeypatch.setattr(cache, "__file__", str(Path(__file__)))  # other code
    demo().tokenize(tokenizer(), 16)
    assert len(counted) == 14


def test_options_are_a_part_of_the_key(tmp_path):
    task = load_task("qa", files(tmp_path))
    assert isinstance(task, QATask)
    keys = {
        cache.key(task.train, tokenizer(), how) for how in (task.encoding(), {**task.encoding(), "stride": 1})
    }
    assert len(keys) == 2
    cut = tokenizer()
    cut(["the film"], truncation=True, max_length=3, padding="max_length")
    assert cache.key(task.train, cut, None) == cache.key(task.train, tokenizer(), None)
    some = task.train.select([0, 2])
    assert cache.key(some, cut, None) != cache.key(task.train, cut, None)
    assert cache.key(some, cut, None) == cache.key(task.train.select([0, 2]), cut, None)


def test_a_damaged_file_is_made_anew(counted, caplog):
    demo().tokenize(tokenizer(), 16)
    for path in cache.folder().iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        demo().tokenize(tokenizer(), 16)
    assert len(counted) == 6
    assert "cannot be read" in caplog.text
    demo().tokenize(tokenizer(), 16)
    assert len(counted) == 6


def test_a_folder_that_cannot_be_written_is_a_warning(counted, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIST_REG_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert len(demo().tokenize(tokenizer(), 16).train) == 20
    assert "tokenized rows cannot be kept in" in caplog.text


def test_nothing_is_left_of_a_write_that_fails(counted, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    demo().tokenize(tokenizer(), 16)
    assert list(cache.folder().iterdir()) == []


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("DIST_REG_CACHE", "off")
    assert cache.folder() is None
    monkeypatch.delenv("DIST_REG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.folder() == Path("/somewhere/dist-reg/tokenized")


def test_little_work_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("DIST_REG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH_KEEPING", 1e9)
    demo().tokenize(tokenizer(), 16)
    assert not (tmp_path / "cache").exists()
