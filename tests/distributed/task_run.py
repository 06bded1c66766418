"""Train a task through the command line, as the tests of every task do."""

from __future__ import annotations

import json
from pathlib import Path

from dist_reg.config import write_yaml
from tests.distributed.launch import run


def train(folder: Path, name: str, processes: int, run_file: dict, deepspeed: str | None) -> dict:
    """`run_file` in `folder` on so many processes: its results.json, with the `losses` of every step."""
    output = folder / name
    fields = {"output_dir": str(output), "logging_steps": 1, "save_strategy": "no", "seed": 3}
    path = folder / f"{name}.yaml"
    write_yaml({**run_file, "deepspeed": deepspeed, "train": {**fields, **run_file["train"]}}, path)
    done = run(["-m", "dist_reg", "train", str(path)], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return json.loads((output / "results.json").read_text()) | {"losses": losses}
