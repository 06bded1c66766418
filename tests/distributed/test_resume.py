"""A killed run continues bit for bit: a real process kill, then the same command again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_reg.checkpoint import MANIFEST
from dist_reg.config import write_yaml
from tests.distributed.launch import kill, run, start
from tests.tiny import save_tiny, write_reviews

pytestmark = [pytest.mark.slow, pytest.mark.compat]

STEPS, SAVED_AT = 20, 10


WARM_UP = 13
"""Steps of one epoch: 200 examples in batches of 16."""
HYPE = {"hype": {"sigma": 0.05, "dropout": "keep"}}
MVCR = {"mvcr": {"warmup_epochs": 1}}
HIRE = {"hire": {}}
CELLS = [
    (1, None, [HYPE, {"rdrop": {"alpha": 1.0}}], STEPS, SAVED_AT),
    (1, "zero2", [HYPE], STEPS, SAVED_AT),
    (2, "zero2", [HYPE, {"r3f": {"sigma": 0.01, "spectral_norm": True}}], STEPS, SAVED_AT),
    (2, "zero3", [HYPE, {"lnsr": {"noise": "secant"}}], STEPS, SAVED_AT),
    (2, "zero3", [MVCR], STEPS + WARM_UP, SAVED_AT),  # killed in the warm-up
    (2, "zero2", [MVCR], STEPS + WARM_UP, 2 * SAVED_AT),  # and after it
    (2, "zero3", [HYPE, HIRE], STEPS, SAVED_AT),
    (1, None, [HIRE], STEPS, SAVED_AT),
]


def write_run(folder: Path, output: Path, deepspeed: str | None, methods: list[dict]) -> Path:
    # Wide enough that steps 11 to 20 take longer than it takes to notice checkpoint-10 and kill.
    data = {"train": str(folder / "train.jsonl"), "dev": str(folder / "dev.jsonl"), "max_length": 32}
    train = {
        "output_dir": str(output),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED_AT,
        "eval_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "seed": 3,
    }
    path = folder / f"{output.name}.yaml"
    run_file = {"model": str(folder / "model"), "task": "classification", "data": data, "methods": methods}
    write_yaml({**run_file, "train": train, "deepspeed": deepspeed, "batch_size": 16}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("run folder")  # a path with a space
    save_tiny(root / "model", "bert", num_labels=2, hidden_size=256, intermediate_size=1024, layers=4)
    write_reviews(root / "train.jsonl", 200)
    write_reviews(root / "dev.jsonl", 40, start=200)
    return root


def losses(output: Path) -> dict[int, str]:
    """Step to log line; of a step that was logged twice, the later one."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: json.dumps(line) for line in lines if "loss" in line}


@pytest.mark.parametrize(("processes", "deepspeed", "methods", "steps", "killed_at"), CELLS)
def test_a_killed_run_resumes_bit_for_bit(folder, processes, deepspeed, methods, steps, killed_at):
    name = f"{processes}-{deepspeed}-{'-'.join(key for method in methods for key in method)}-{killed_at}"
    whole, broken = folder / f"whole-{name}", folder / f"broken-{name}"
    done = run(["-m", "dist_reg", "train", str(write_run(folder, whole, deepspeed, methods))], processes)
    assert done.returncode == 0, done.stderr[-3000:]

    command = ["-m", "dist_reg", "train", str(write_run(folder, broken, deepspeed, methods))]
    process = start(command, processes, log=folder / f"{name}.log")
    sealed = broken / "checkpoints" / f"checkpoint-{killed_at}" / MANIFEST
    deadline = time.monotonic() + 300
    while not sealed.exists():
        assert process.poll() is None, (folder / f"{name}.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    kill(process)
    assert not (broken / "results.json").exists()
    assert max(losses(broken)) < steps

    resumed = run(command, processes)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"resuming from {broken / 'checkpoints' / f'checkpoint-{killed_at}'}" in resumed.stdout
    expected, found = losses(whole), losses(broken)
    assert sorted(found) == list(range(1, steps + 1))
    assert found == expected
    weights, reference = (
        load_file(broken / "model" / "model.safetensors"),
        load_file(whole / "model" / "model.safetensors"),
    )
    assert weights.keys() == reference.keys()
    assert all(weights[key].equal(reference[key]) for key in reference)
