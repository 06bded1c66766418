"""From a run file's `train`, `batch_size` and `deepspeed` to `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
import transformers

from dist_reg.batch import cut_batch
from dist_reg.config import RunConfig
from dist_reg.ds_config import check_agreement, check_optimizer, read_ds_config
from dist_reg.errors import UserError, nearest
from dist_reg.runtime import world_size
from dist_reg.trainer import SAMPLING_STRATEGIES

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "num_train_epochs": 3,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "per_device_eval_batch_size": 32,
    "report_to": "none",
    "restore_callback_states_from_checkpoint": True,
}
"""What a run starts from where its file is silent; everything else is Transformers' own default."""

RENAMED = {
    "warmup_ratio": "warmup_steps (a fraction below 1 is a ratio)",
    "group_by_length": "data.group_by_length, whose order is the same at every topology",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": "train.output_dir with another folder",
    "logging_dir": "report_to and its own environment variables",
    "save_safetensors": "nothing: safetensors is the only format",
}

WITHOUT_EFFECT = {
    "dataloader_drop_last": "every epoch is filled up to whole batches and nothing is dropped",
    "do_train": "dist-reg train trains",
    "do_eval": "train.eval_strategy says when to evaluate",
    "do_predict": "dist-reg eval evaluates a finished model",
    "resume_from_checkpoint": "a run resumes from its newest whole checkpoint by itself",
}
"""Fields that change nothing here: Transformers leaves them to its example scripts, or the run decides itself."""

REFUSED = {
    "auto_find_batch_size": "it would change batch_size and with it the run",
    "batch_eval_metrics": "metrics are those of a whole evaluation set",
    "fsdp": "weights are sharded by DeepSpeed here; deepspeed: zero3 does what it does",
    "neftune_noise_alpha": "methods: neftune does it, by every example's own length",
    "prediction_loss_only": "the metrics of the task need predictions",
    "save_only_model": "it would leave a killed run nothing to resume from; the exported model holds weights alone",
}
"""Fields that contradict what a run is."""

LESS_IS_BETTER = ("loss", "perplexity")

SETTING_ERRORS = (ValueError, TypeError, ImportError, KeyError, AttributeError, AssertionError, RuntimeError)
"""What Transformers raises for a setting it cannot take."""


def check_settings(run: RunConfig) -> None:
    """Raise UserError for what is wrong with `train` and `deepspeed` of a run file by itself."""
    train = {**DEFAULTS, **run.train}
    _check_names(train)
    _check_values(train)
    if run.deepspeed is not None:
        read_ds_config(run.deepspeed)


def training_arguments(
    run: RunConfig, checkpoints: Path, *, main_metric: str, greater_is_better: bool
) -> transformers.TrainingArguments:
    """TrainingArguments of `run` on this world size; must exist before the model is loaded (ZeRO-3).

    `checkpoints` is where checkpoints go. Raises UserError for an unknown field, a batch that does not divide, or
    an optimizer that ZeRO cannot shard.
    """
    train = {**DEFAULTS, **run.train}
    _check_names(train)
    _check_values(train)
    if train.get("eval_strategy") == "no" or train.get("save_strategy") == "no":
        train["load_best_model_at_end"] = bool(run.train.get("load_best_model_at_end", False))
    train.update(cut_batch(run.batch_size, world_size(), train))
    if run.early_stopping is not None and train.get("eval_strategy") == "no":
        raise UserError("early_stopping needs evaluations; set train.eval_strategy to epoch or steps.")
    if not torch.cuda.is_available():
        train.setdefault("use_cpu", True)
    train.setdefault("metric_for_best_model", main_metric)
    chosen = str(train["metric_for_best_model"]).removeprefix("eval_")
    train.setdefault(
        "greater_is_better", greater_is_better if chosen == main_metric else chosen not in LESS_IS_BETTER
    )
    train.setdefault("disable_tqdm", not sys.stderr.isatty())
    config = {} if run.deepspeed is None else read_ds_config(run.deepspeed)
    if run.deepspeed is not None:
        check_optimizer(train.get("optim", "adamw_torch"), config)
        check_agreement(run, train, config)
        train["deepspeed"] = config
    if run.data.streaming:
        _lay_out_stream(train, run.train)
    train["output_dir"] = str(checkpoints)
    try:
        args = transformers.TrainingArguments(**train)
        _ = args.device  # joins the process group
        _try_optimizer_and_schedule(args, own_optimizer="optimizer" not in config)
    except UserError:
        raise
    except SETTING_ERRORS as error:
        raise UserError(f"train: {' '.join(str(error).split())}") from None
    if args.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible and one is used; torchrun --nproc-per-node %d -m dist_reg train uses all.",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1
    if run.deepspeed is not None:
        import deepspeed

        # ZeRO-3 shards the model while it is loaded and must know the world's size by then.
        deepspeed.init_distributed(auto_mpi_discovery=False)
    return args


def _try_optimizer_and_schedule(args: transformers.TrainingArguments, *, own_optimizer: bool) -> None:
    """Build the optimizer and the schedule for one weight, so that a wrong option shows before anything is written."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=0.1)
    if own_optimizer:
        model: Any = torch.nn.ParameterList([weight])
        build, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not {"params", "model", "optimizer_dict"} & options.keys():
            optimizer = build([weight], **options)
    options: Any = args.lr_scheduler_kwargs
    transformers.get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, options)


def activation_checkpointing_field() -> str:
    """The name of TrainingArguments' switch in the installed Transformers; it changed in 5.23."""
    return (
        "activation_checkpointing"
        if "activation_checkpointing" in field_names()
        else "gradient_checkpointing"
    )


def field_names() -> list[str]:
    """Every field of TrainingArguments in the installed Transformers."""
    return [item.name for item in dataclasses.fields(transformers.TrainingArguments) if item.init]


def _check_names(train: dict[str, Any]) -> None:
    known = field_names()
    for old in ("gradient_checkpointing", "activation_checkpointing"):
        if old in train:
            train[activation_checkpointing_field()] = train.pop(old)
        if f"{old}_kwargs" in train:
            train[f"{activation_checkpointing_field()}_kwargs"] = train.pop(f"{old}_kwargs")
    for name in train:
        if name == "deepspeed":
            raise UserError(
                "train.deepspeed: name the configuration at the top of the run file, deepspeed: zero2."
            )
        if name in WITHOUT_EFFECT:
            raise UserError(f"train.{name} has no effect: {WITHOUT_EFFECT[name]}; leave it out.")
        if name in RENAMED and name not in known:
            raise UserError(
                f"train.{name} is not a field of TrainingArguments any more; use {RENAMED[name]}."
            )
        if name not in known:
            raise UserError(f"train: unknown key {name!r}; {nearest(name, known)}")


def _lay_out_stream(train: dict[str, Any], given: Mapping[str, Any]) -> None:
    """What a training set without a length needs, and how its rows reach the processes."""
    steps = train.get("max_steps", -1)
    if steps < 1:
        raise UserError("data.streaming needs train.max_steps: how many rows there are is not known.")
    if "num_train_epochs" in given:
        raise UserError(
            "train.num_train_epochs has no use with data.streaming, which train.max_steps ends; leave it out."
        )
    if train.get("dataloader_num_workers", 0):
        raise UserError(
            "train.dataloader_num_workers must be 0 with data.streaming, whose rows are counted as they are read."
        )
    for what in ("eval", "save"):
        if given.get(f"{what}_strategy") == "epoch":
            raise UserError(
                f"train.{what}_strategy: a stream has no epochs; use steps, and train.{what}_steps."
            )
        if train[f"{what}_strategy"] == "epoch":
            train[f"{what}_strategy"] = "steps"
        if train[f"{what}_strategy"] == "steps":
            train.setdefault(f"{what}_steps", max(1, steps // 10))
    config = train.get("accelerator_config") or {}
    if not isinstance(config, dict):
        raise UserError(
            "train.accelerator_config must stand in the run file itself with data.streaming, which adds to it."
        )
    # every process reads the stream and takes its share: batches of different lengths cannot be sent around
    train["accelerator_config"] = {**config, "dispatch_batches": False}


def _check_values(train: dict[str, Any]) -> None:
    """The plain types of TrainingArguments, which it does not check itself, and rates that would train nothing."""
    hints = typing.get_type_hints(transformers.TrainingArguments)
    for name, value in list(train.items()):
        if name in REFUSED and value:
            raise UserError(f"train.{name} cannot be used: {REFUSED[name]}; leave it out.")
        kinds = set(typing.get_args(hints[name])) or {hints[name]}
        if any(
            kind not in (int, float, bool, str, dict, type(None)) and typing.get_origin(kind) is not dict
            for kind in kinds
        ):
            continue
        if isinstance(value, bool) and bool not in kinds and str not in kinds:
            raise UserError(f"train.{name} must be a number; it is {value!r}.")
        try:
            # Kept: in YAML 1.2 the words off and no are texts, and a text is true.
            train[name] = pydantic.TypeAdapter(hints[name]).validate_python(value)
        except pydantic.ValidationError as error:
            raise UserError(f"train.{name}: {error.errors()[0]['msg'].lower()}; it is {value!r}.") from None
    if not train.get("eval_do_concat_batches", True):
        raise UserError(
            "train.eval_do_concat_batches cannot be false: metrics are those of a whole evaluation set."
        )
    strategy = train.get("train_sampling_strategy", "random")
    if strategy not in SAMPLING_STRATEGIES:
        raise UserError(
            f"train.train_sampling_strategy cannot be {strategy!r}: its order depends on the number of processes and is "
            f"not replayed by a resume; use {' or '.join(SAMPLING_STRATEGIES)}."
        )
    if not 0 <= train.get("seed", 0) < 2**32:
        raise UserError(f"train.seed must be from 0 to 2**32 - 1; it is {train['seed']}.")
    if train.get("max_steps", -1) == 0:
        raise UserError(
            "train.max_steps is 0, which trains nothing; give a number of steps, or leave it out."
        )
    if train.get("max_steps", -1) < 0 and not train["num_train_epochs"] > 0:
        raise UserError(
            f"train.num_train_epochs is {train['num_train_epochs']}, which trains nothing; it must be above 0."
        )
    if train.get("dataloader_num_workers", 0) < 0:
        raise UserError(
            f"train.dataloader_num_workers must be at least 0; it is {train['dataloader_num_workers']}."
        )
    if train["per_device_eval_batch_size"] < 1:
        raise UserError("train.per_device_eval_batch_size must be at least 1.")
    rate = train["learning_rate"]
    if not (math.isfinite(float(rate)) and float(rate) >= 0):
        raise UserError(f"train.learning_rate must be a finite number >= 0; it is {rate}.")
