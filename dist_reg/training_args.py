"""From a run file's `train`, `batch_size` and `deepspeed` to `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import sys
import typing
from pathlib import Path
from typing import Any

import pydantic
import torch
import transformers

from dist_reg.config import RunConfig
from dist_reg.errors import UserError, nearest
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
    "group_by_length": "nothing: the order of examples must not depend on their lengths and so on the topology",
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
    "prediction_loss_only": "the metrics of the task need predictions",
    "save_only_model": "it would leave a killed run nothing to resume from; the exported model holds weights alone",
}
"""Fields that contradict what a run is."""

ELEMENTWISE_OPTIMIZERS = {
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_apex_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "sgd",
    "adagrad",
    "grokadamw",
    "schedule_free_adamw",
    "schedule_free_sgd",
}
"""Optimizers whose update of an element needs that element alone: ZeRO hands them flat slices of the weights."""


SETTING_ERRORS = (ValueError, TypeError, ImportError, KeyError, AttributeError, AssertionError, RuntimeError)
"""What Transformers raises for a setting it cannot take."""

ZERO_OPTIMIZERS = ("adam", "adamw", "adagrad", "lion")
"""Types of a DeepSpeed JSON's own optimizer that ZeRO can shard."""

DS_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "optimizer",
    "scheduler",
    "activation_checkpointing",
    "steps_per_print",
    "wall_clock_breakdown",
)
"""Keys of a DeepSpeed JSON that are often misspelt; DeepSpeed takes any other key without a word."""


def check_settings(run: RunConfig) -> None:
    """Raise UserError for what is wrong with `train` and `deepspeed` of a run file by itself."""
    train = {**DEFAULTS, **run.train}
    _check_names(train)
    _check_values(train)
    if run.deepspeed is not None:
        read_ds_config(run.deepspeed)


def ds_config_path(name: str) -> Path:
    """The DeepSpeed JSON that `deepspeed:` names: a shipped name or a path."""
    path = Path(name).expanduser()
    if path.suffix == ".json" or os.sep in name:
        if not path.is_file():
            raise UserError(
                f"deepspeed: {name} does not exist; shipped names are {', '.join(shipped_ds_configs())}."
            )
        return path
    shipped = shipped_ds_configs()
    if name not in shipped:
        raise UserError(f"deepspeed: unknown configuration {name!r}; {nearest(name, list(shipped))}")
    return shipped[name]


def shipped_ds_configs() -> dict[str, Path]:
    """Name to path of the DeepSpeed configurations that come with the project."""
    package = Path(__file__).parent
    for folder in (package / "ds_configs", package.parent / "ds_configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.json"))}
    return {}


def read_ds_config(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration that `deepspeed:` names, as data."""
    path = ds_config_path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed: {path} cannot be read as JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {path} must hold a JSON object.")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f'deepspeed: {path}: zero_optimization must be an object such as {{"stage": 2}}.')
    for key in config:
        close = difflib.get_close_matches(key, DS_KEYS, n=1, cutoff=0.85)
        if close and key not in DS_KEYS:
            raise UserError(f"deepspeed: {path}: unknown key {key!r}; did you mean {close[0]!r}?")
    _check_zero(zero, path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.setdefault(key, "auto")
    # Left out, DeepSpeed clips at 1.0 whatever the run file says, and exports no weights under ZeRO-3.
    config.setdefault("gradient_clipping", "auto")
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config


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
    train.update(_batch_fields(run, train))
    if run.early_stopping is not None and train.get("eval_strategy") == "no":
        raise UserError("early_stopping needs evaluations; set train.eval_strategy to epoch or steps.")
    if not torch.cuda.is_available():
        train.setdefault("use_cpu", True)
    train.setdefault("metric_for_best_model", main_metric)
    train.setdefault("greater_is_better", greater_is_better)
    train.setdefault("disable_tqdm", not sys.stderr.isatty())
    config = {} if run.deepspeed is None else read_ds_config(run.deepspeed)
    if run.deepspeed is not None:
        _check_optimizer(train.get("optim", "adamw_torch"), config)
        _check_agreement(run, train, config)
        train["deepspeed"] = config
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


def _batch_fields(run: RunConfig, train: dict[str, Any]) -> dict[str, int]:
    """Micro-batch and accumulation whose product over all processes is `batch_size`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = train.get("per_device_train_batch_size")
    steps = train.get("gradient_accumulation_steps")
    if any(given is not None and (not isinstance(given, int) or given < 1) for given in (micro, steps)):
        rest = 1
    elif micro is None:
        steps = steps or 1
        micro, rest = divmod(run.batch_size, world * steps)
    elif steps is None:
        steps, rest = divmod(run.batch_size, world * micro)
    else:
        rest = run.batch_size - world * micro * steps
    if rest or not micro or not steps:
        raise UserError(
            f"batch_size {run.batch_size} is not processes ({world}) x micro-batch "
            f"({train.get('per_device_train_batch_size', 'free')}) x accumulation "
            f"({train.get('gradient_accumulation_steps', 'free')}); choose numbers whose product it is."
        )
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}


def _check_zero(zero: dict[str, Any], path: Path) -> None:
    """Raise UserError for a `zero_optimization` section that DeepSpeed's own configuration class refuses."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = {key: value for key, value in zero.items() if value != "auto"}
    try:
        DeepSpeedZeroConfig(**given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"deepspeed: {path}: zero_optimization.{key}: {first['msg'].lower()}; it is {first['input']!r}."
        ) from None
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"deepspeed: {path}: zero_optimization: {' '.join(str(error).split())}") from None


def _check_agreement(run: RunConfig, train: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise UserError where the DeepSpeed JSON fixes a number that the run file says otherwise."""
    ours = {
        "train_batch_size": ("batch_size", run.batch_size),
        "train_micro_batch_size_per_gpu": (
            "train.per_device_train_batch_size",
            train["per_device_train_batch_size"],
        ),
        "gradient_accumulation_steps": (
            "train.gradient_accumulation_steps",
            train["gradient_accumulation_steps"],
        ),
        "gradient_clipping": ("train.max_grad_norm", train.get("max_grad_norm", 1.0)),
    }
    for key, (name, value) in ours.items():
        if config[key] not in ("auto", value):
            raise UserError(
                f"deepspeed: {run.deepspeed} says {key} {config[key]!r} and the run {name} {value}; "
                'write "auto" there, the run file says it.'
            )


def _check_optimizer(optim: str, config: dict[str, Any]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage and "optimizer" in config:
        kind = str(dict(config["optimizer"]).get("type"))
        if kind.lower() not in ZERO_OPTIMIZERS:
            raise UserError(
                f"deepspeed: ZeRO-{stage} cannot shard the optimizer {kind!r}; use one of {', '.join(ZERO_OPTIMIZERS)}, or "
                "leave the section out and say train.optim."
            )
        return
    name = str(getattr(optim, "value", optim))
    if stage and name not in ELEMENTWISE_OPTIMIZERS:
        raise UserError(
            f"train.optim: ZeRO-{stage} cannot shard {name!r}, which needs whole weight matrices; "
            "use adamw_torch, or leave deepspeed out."
        )
