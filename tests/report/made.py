"""Results of runs, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HYPE = {"sigma": 1e-5, "distribution": "normal", "scale": "absolute", "layers": "all", "site": "input", "dropout": "off"}  # fmt: skip

SETTINGS = {
    "model_revision": None,
    "batch_size": 16,
    "train": {"learning_rate": 5e-5, "num_train_epochs": 3},
    "data": {"max_length": 128},
    "early_stopping": None,
}


def result(score: float, *, seed: int = 0, seconds: float = 10.0, **changes: Any) -> dict[str, Any]:
    return {
        "task": "sst2",
        "model": "models/bert-base",
        "model_config": {},
        "methods": [],
        "seed": seed,
        "data_seed": 0,
        "train_examples": 500,
        "settings": SETTINGS,
        "main_metric": "accuracy",
        "metrics": {"dev": {"accuracy": score, "loss": 0.5}, "ood": {"accuracy": score - 0.1, "loss": 0.6}},
        "timings": {"train_seconds": seconds},
        **changes,
    }


def scored(scores: list[float], **changes: Any) -> list[dict[str, Any]]:
    """A result a score, with seeds 0, 1 and on, and a development set alone."""
    metric = changes.get("main_metric", "accuracy")
    return [
        result(score, seed=seed, **{"metrics": {"dev": {metric: score}}, **changes})
        for seed, score in enumerate(scores)
    ]


def store(folder: Path, results: list[dict], logs: dict[int, str] | None = None) -> Path:
    """`results` as run folders, with `logs` by their number."""
    for index, content in enumerate(results):
        path = folder / f"run {index:02}" / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        if logs and index in logs:
            (path.parent / "log.jsonl").write_text(logs[index])
    return folder


def log(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
