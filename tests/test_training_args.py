"""From `batch_size`, `train` and `deepspeed` to TrainingArguments: names, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.training_args import OptimizerNames

from dist_reg.config import ModelConfig, RunConfig
from dist_reg.ds_config import (
    ELEMENTWISE_OPTIMIZERS,
    check_optimizer,
    ds_config_path,
    read_ds_config,
    shipped_ds_configs,
)
from dist_reg.errors import UserError
from dist_reg.training_args import (
    DEFAULTS,
    REFUSED,
    RENAMED,
    WITHOUT_EFFECT,
    _check_names,
    activation_checkpointing_field,
    check_settings,
    field_names,
    training_arguments,
)

MICRO, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"


def make(batch_size: int = 8, **fields: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(name="-"), batch_size=batch_size, **fields)


def sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# -- names of fields


@pytest.mark.parametrize("name", RENAMED)
def test_renamed_field_gets_its_message(name):
    assert name not in field_names()
    with pytest.raises(UserError) as error:
        _check_names({name: 1})
    assert sentence(error) == (
        f"train.{name} is not a field of TrainingArguments any more; use {RENAMED[name]}."
    )


def test_what_the_messages_and_defaults_name_exists():
    known = field_names()
    assert set(DEFAULTS) <= set(known)
    for replacement in RENAMED.values():
        word = replacement.partition(" ")[0].rstrip(":")
        assert word in known or word in (
            "train.output_dir",
            "data.group_by_length,",
            "nothing:",
            "nothing",
        ), replacement


@pytest.mark.parametrize(
    ("name", "close"), [("lerning_rate", "learning_rate"), ("epochs", ""), ("num_epochs", "num_train_epochs")]
)
def test_unknown_field_gets_the_nearest_name(name, close):
    with pytest.raises(UserError, match=f"train: unknown key '{name}'") as error:
        _check_names({name: 1})
    assert close in sentence(error)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_field_without_effect_is_refused(name):
    with pytest.raises(UserError, match=f"train.{name} has no effect"):
        _check_names({name: True})


def test_deepspeed_belongs_to_the_top_of_the_run_file():
    with pytest.raises(UserError, match="train.deepspeed: name the configuration at the top of the run file"):
        _check_names({"deepspeed": "zero2"})


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_activation_checkpointing(name):
    train = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    _check_names(train)
    field = activation_checkpointing_field()
    assert train == {field: True, f"{field}_kwargs": {"use_reentrant": False}}


# -- values that TrainingArguments refuses, or should


WRONG = {
    "eval_strategy": "stepz",
    "lr_scheduler_type": "linearly",
    "optim": "adamw_tork",
    "logging_steps": 0,
    "seed": "x",
    "max_steps": "many",
    "num_train_epochs": "three",
    "learning_rate": "fast",
    "weight_decay": "some",
    "max_grad_norm": "x",
    "warmup_steps": "x",
    "bf16": "perhaps",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_value_is_one_sentence_that_names_it(tmp_path, name):
    run = make(train={"output_dir": str(tmp_path), name: WRONG[name]})
    with pytest.raises(UserError) as error:
        training_arguments(run, tmp_path, main_metric="accuracy", greater_is_better=True)
    message = sentence(error)
    assert message.startswith("train")
    assert name in message or str(WRONG[name]) in message


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_learning_rate_is_refused_before_training(tmp_path, value):
    run = make(train={"output_dir": str(tmp_path), "learning_rate": value})
    with pytest.raises(UserError, match="learning_rate"):
        training_arguments(run, tmp_path, main_metric="accuracy", greater_is_better=True)


def test_arguments_of_a_small_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fields = {"output_dir": "elsewhere", STEPS: 2, "seed": 5, "eval_strategy": "no"}
    args = training_arguments(make(train=fields), tmp_path / "c", main_metric="mcc", greater_is_better=True)
    assert args.output_dir == str(tmp_path / "c")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 2)
    assert (args.seed, args.learning_rate) == (5, DEFAULTS["learning_rate"])
    assert args.metric_for_best_model == "mcc"
    assert args.load_best_model_at_end is False  # nothing to select on without evaluations
    assert fields == {"output_dir": "elsewhere", STEPS: 2, "seed": 5, "eval_strategy": "no"}


# -- DeepSpeed


@pytest.mark.parametrize("optim", sorted(ELEMENTWISE_OPTIMIZERS & {name.value for name in OptimizerNames}))
@pytest.mark.parametrize("stage", [1, 3])
def test_elementwise_optimizer_is_accepted(optim, stage):
    check_optimizer(optim, {"zero_optimization": {"stage": stage}})
    check_optimizer(OptimizerNames(optim), {"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("optim", ["adafactor", "galore_adamw", "lomo", "apollo_adamw", "adalomo"])
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_optimizer_that_needs_whole_matrices_is_refused(optim, name):
    with pytest.raises(UserError, match=f"train.optim: ZeRO-{name[-1]} cannot shard '{optim}'") as error:
        check_optimizer(optim, read_ds_config(name))
    assert "adamw_torch" in sentence(error)
    check_optimizer(optim, {"zero_optimization": {"stage": 0}})
    check_optimizer(optim, {})


def test_optimizer_is_refused_by_training_arguments(tmp_path):
    run = make(train={"output_dir": str(tmp_path), "optim": "adafactor"}, deepspeed="zero3")
    with pytest.raises(UserError, match="ZeRO-3 cannot shard 'adafactor'"):
        training_arguments(run, tmp_path, main_metric="accuracy", greater_is_better=True)


def test_names_of_deepspeed_configurations(tmp_path, monkeypatch):
    shipped = shipped_ds_configs()
    assert {"zero1", "zero2", "zero3", "zero3_offload", "zero3_hpz"} <= set(shipped)
    assert ds_config_path("zero2") == shipped["zero2"]
    with pytest.raises(UserError, match="deepspeed: unknown configuration 'zero22'; did you mean 'zero2'?"):
        ds_config_path("zero22")
    monkeypatch.chdir(tmp_path)
    for missing in ("mine.json", "configs/mine", "./zero2"):
        with pytest.raises(UserError, match=f"deepspeed: {missing} does not exist; shipped names are zero1"):
            ds_config_path(missing)
    own = tmp_path / "my own.json"
    own.write_text("{}")
    assert ds_config_path(str(own)) == own
    assert ds_config_path("my own.json") == Path("my own.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'stage': 2}", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"zero_optimization": 3}', "zero_optimization"),
        ('{"zero_optimization": null}', "zero_optimization"),
    ],
)
def test_broken_deepspeed_file(tmp_path, text, message):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match="deepspeed: ") as error:
        check_optimizer("adamw_torch", read_ds_config(str(path)))
    assert message in sentence(error)
    assert str(path) in sentence(error)


def test_partition_size_is_the_nodes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_ds_config("zero3_hpz")["zero_optimization"]["zero_hpz_partition_size"] == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert read_ds_config("zero3_hpz")["zero_optimization"]["zero_hpz_partition_size"] == 1
    fixed = tmp_path / "own.json"
    fixed.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    assert read_ds_config(str(fixed))["zero_optimization"]["zero_hpz_partition_size"] == 2


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (
            {"save_only_model": True},
            "train.save_only_model cannot be used: it would leave a killed run nothing to resume from",
        ),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train.train_sampling_strategy cannot be 'group_by_length'",
        ),
        (
            {"dataloader_drop_last": True},
            "train.dataloader_drop_last has no effect: every epoch is filled up",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_would_break_resume_or_do_nothing_are_refused(tmp_path, train, text):
    with pytest.raises(UserError) as error:
        training_arguments(make(train=train), tmp_path, main_metric="loss", greater_is_better=False)
    assert text in sentence(error)


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_contradict_a_run_are_refused(tmp_path, name):
    assert name in field_names()
    with pytest.raises(UserError, match=f"train.{name} cannot be used: "):
        training_arguments(make(train={name: True}), tmp_path, main_metric="loss", greater_is_better=False)


def test_values_are_taken_as_what_they_mean(tmp_path):
    """YAML 1.2 reads off and no as texts, and quotes make any number one."""
    train = {"load_best_model_at_end": "no", "bf16": "off", "max_steps": "4", "learning_rate": "1e-3"}
    args = training_arguments(
        make(train={**train, "seed": 1.0}), tmp_path, main_metric="loss", greater_is_better=False
    )
    assert (args.load_best_model_at_end, args.bf16, args.max_steps) == (False, False, 4)
    assert (args.learning_rate, args.seed) == (1e-3, 1)


@pytest.mark.parametrize(
    ("train", "text"),
    [
        ({"seed": True}, "train.seed must be a number; it is True"),
        ({"num_train_epochs": 0}, "train.num_train_epochs is 0.0, which trains nothing"),
        ({"dataloader_num_workers": -1}, "train.dataloader_num_workers must be at least 0"),
        ({"lr_scheduler_kwargs": {"foo": 3}}, "foo"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"adam_beta1": 2.0}, "beta"),
        ({"optim_args": "foo"}, "train: "),
        ({"eval_strategy": "steps", "save_strategy": "epoch"}, "Evaluation strategy"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_cannot_be_are_one_sentence_before_anything_is_written(tmp_path, train, text):
    with pytest.raises(UserError) as error:
        training_arguments(make(train=train), tmp_path / "out", main_metric="loss", greater_is_better=False)
    assert text in sentence(error)
    assert not (tmp_path / "out").exists()


# -- a DeepSpeed configuration of one's own


def ds_run(folder: Path, config: dict, **fields: Any) -> RunConfig:
    path = folder / "my ds.json"
    path.write_text(json.dumps(config))
    return make(deepspeed=str(path), **fields)


def test_the_smallest_deepspeed_file_is_enough(tmp_path):
    config = read_ds_config(ds_run(tmp_path, {"zero_optimization": {"stage": 2}}).deepspeed)
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"zero_optimization": {"stage": 5}}, "zero_optimization"),
        ({"zero_optimization": {"stage": "x"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
        ({"optimizer": "AdamW"}, "optimizer must be an object"),
        ({"gradient_cliping": 1}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
    ],
    ids=["stage 5", "stage x", "zero key", "optimizer", "top key"],
)
def test_a_mistake_in_a_deepspeed_file_is_one_sentence(tmp_path, config, text):
    with pytest.raises(UserError) as error:
        read_ds_config(ds_run(tmp_path, config).deepspeed)
    assert text in sentence(error)
    assert "my ds.json" in sentence(error)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu 3"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5 and the run train.max_grad_norm 1.0"),
        (
            {"zero_optimization": {"stage": 2}, "optimizer": {"type": "OneBitAdam"}},
            "ZeRO-2 cannot shard the optimizer 'OneBitAdam'",
        ),
    ],
    ids=["micro-batch", "clipping", "optimizer"],
)
def test_a_deepspeed_file_that_disagrees_with_the_run_is_refused(tmp_path, config, text):
    with pytest.raises(UserError) as error:
        training_arguments(ds_run(tmp_path, config), tmp_path, main_metric="loss", greater_is_better=False)
    assert text in sentence(error)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("neftune_noise_alpha", 5, "methods: neftune does it"),
        ("eval_do_concat_batches", False, "metrics are those of a whole evaluation set"),
    ],
)
def test_settings_that_would_act_twice_or_split_the_evaluation(name, value, reason):
    run = RunConfig(model=ModelConfig(name="minilm"), train={"output_dir": "out", name: value})
    with pytest.raises(UserError, match=f"train.{name} cannot be.*{reason}"):
        check_settings(run)
