"""Streamed rows and batches of one length through the command line: the same run on any number of processes, and resumed."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.distributed.task_run import train
from tests.tasks.test_stream import write_shards
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow


def run_file(folder, data: dict) -> dict:
    save_tiny(folder / "model", "bert", dropout=0.0, num_labels=2)
    write_shards(folder, rows=90)
    return {
        "model": str(folder / "model"),
        "task": "classification",
        "data": {"data_dir": str(folder), "dev": "dev.jsonl", **data},
        "methods": [{"hype": {"sigma": 0.05}}],
        "batch_size": 8,
        "train": {"max_steps": 16, "learning_rate": 5e-3, "eval_strategy": "no"},
    }


@pytest.mark.parametrize(
    "data",
    [
        {"train": "part-*.jsonl", "streaming": True, "shuffle_buffer": 20},
        {"train": "part-1.jsonl", "group_by_length": True},
    ],
    ids=["streamed", "grouped"],
)
def test_the_same_run_on_one_process_and_two(tmp_path, data):
    file = run_file(tmp_path, data)
    one = train(tmp_path, "one", 1, file, None)
    cut = {**file, "train": {**file["train"], "gradient_accumulation_steps": 2}}
    assert train(tmp_path, "cut", 1, cut, None)["losses"] == pytest.approx(one["losses"], rel=5e-4)
    two = train(tmp_path, "two", 2, file, "zero3")
    assert two["losses"] == pytest.approx(one["losses"], rel=5e-4)
    if "streaming" in data:
        # 16 steps of 8 are 128 rows, and 20 more are in the buffer
        assert (
            one["counts"]["train"] == {"rows": 90, "rows_left_out": 0, "passes": 1} == two["counts"]["train"]
        )
        assert one["train_examples"] == 90


def test_a_stream_resumes_bit_for_bit(tmp_path):
    file = run_file(tmp_path, {"train": "part-*.jsonl", "streaming": True})
    file["train"] |= {"save_strategy": "steps", "save_steps": 10}
    whole = train(tmp_path, "run", 1, file, None)
    output = tmp_path / "run"
    weights = (output / "model" / "model.safetensors").read_bytes()
    (output / "results.json").unlink()
    shutil.rmtree(output / "checkpoints" / "checkpoint-16")
    again = train(tmp_path, "run", 1, file, None)
    assert again["timings"]["resumed"]
    assert again["losses"][-6:] == whole["losses"][-6:]
    assert (output / "model" / "model.safetensors").read_bytes() == weights


def test_what_a_stream_needs(tmp_path):
    from tests.distributed.launch import run

    file = run_file(tmp_path, {"train": "part-*.jsonl", "streaming": True})
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps(file))
    for override, message in (
        ("train.max_steps=-1", "data.streaming needs train.max_steps"),
        ("train.num_train_epochs=2", "train.num_train_epochs has no use with data.streaming"),
        ("train.save_strategy=epoch", "train.save_strategy: a stream has no epochs; use steps"),
        ("train.accelerator_config=a.json", "train.accelerator_config must stand in the run file itself"),
        ("train.dataloader_num_workers=2", "train.dataloader_num_workers must be 0 with data.streaming"),
        ("methods.mvcr.warmup_epochs=1", "warmup_epochs needs a training set with a length"),
    ):
        done = run(["-m", "dist_reg", "train", str(path), override])
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
