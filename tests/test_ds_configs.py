"""Every shipped DeepSpeed configuration is filled as Transformers fills it and read by DeepSpeed's own class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import transformers
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from dist_reg.ds_config import read_ds_config

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
NAMES = [path.stem for path in FILES]
HIDDEN = 32


def fill(name: str, world: int = 4, **changes: Any) -> dict[str, Any]:
    """The configuration `name` after Transformers has written the run's values into it."""
    args = SimpleNamespace(
        world_size=world, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_grad_norm=0.7,
        learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0,
        save_on_each_node=False, fp16=False, fp16_full_eval=False, bf16=False, bf16_full_eval=False,
        get_warmup_steps=lambda steps: 0, **changes,
    )  # fmt: skip
    filled = HfTrainerDeepSpeedConfig(read_ds_config(name))
    filled.trainer_config_process(args)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=HIDDEN))
    filled.trainer_config_finalize(args, model, 100)
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    return filled.config


def load(config: dict[str, Any], world: int) -> Any:
    """DeepSpeed's own reading of `config` on `world` processes."""
    from deepspeed.runtime import config as deepspeed_config

    with mock.patch.multiple(deepspeed_config.dist, get_rank=lambda: 0, get_world_size=lambda: world):
        return deepspeed_config.DeepSpeedConfig(config)


def leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for value in node.values():
            yield from leaves(value)
    else:
        yield node


def test_the_documented_names_are_there():
    assert {"zero1", "zero2", "zero3", "zero3_offload", "zero3_hpz"} <= set(NAMES)


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_reads_it_once_filled(name, world, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    filled = fill(name, world)
    assert "auto" not in list(leaves(filled))
    read = load(filled, world)
    assert read.zero_optimization_stage == int(name[len("zero")])
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (2, 3)
    assert read.train_batch_size == 6 * world
    assert read.gradient_clipping == 0.7
    assert not read.float16_config.enabled
    assert not read.bfloat16_config.enabled
    zero = read.zero_config
    if name == "zero3_offload":
        assert zero.offload_optimizer.device == "cpu"
        assert zero.offload_param.device == "cpu"
    else:
        assert zero.offload_optimizer is None
        assert zero.offload_param is None
    assert zero.zero_hpz_partition_size == (world if name == "zero3_hpz" else 1)
    if name.startswith("zero3"):
        assert zero.gather_16bit_weights_on_model_save
        assert zero.param_persistence_threshold == 10 * HIDDEN


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_precision_follows_the_run(name, dtype):
    with mock.patch.dict("os.environ", {"LOCAL_WORLD_SIZE": "1"}):
        config = json.loads(json.dumps(read_ds_config(name)))
    filled = HfTrainerDeepSpeedConfig(config)
    for key in ("bf16", "fp16"):
        filled.fill_only(f"{key}.enabled", key == dtype)
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    assert filled.config["bf16"]["enabled"] is (dtype == "bf16")
    assert filled.config["fp16"]["enabled"] is (dtype == "fp16")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_the_run_decides_is_left_to_it(path):
    """DeepSpeed clips at a value of its own where `gradient_clipping` is left out, so each file has it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in (
        "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping",
    ):  # fmt: skip
        assert config[key] == "auto", key
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}
    for key in ("optimizer", "scheduler"):
        assert key not in config


def test_files_differ_in_zero_optimization_alone():
    common = []
    for path in FILES:
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("zero_optimization")
        common.append(config)
    assert all(config == common[0] for config in common)


@pytest.mark.parametrize("name", NAMES)
def test_partition_size_is_filled_from_the_node(name, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    zero = read_ds_config(name)["zero_optimization"]
    assert zero.get("zero_hpz_partition_size") == (8 if name == "zero3_hpz" else None)


@pytest.mark.parametrize("name", NAMES)
def test_readme_mentions_it(name):
    words = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`{name}`" in words or f"{name}.json" in words or f"deepspeed: {name}" in words
