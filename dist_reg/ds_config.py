"""The DeepSpeed JSON that a run names: found, completed, and held against what DeepSpeed and the run file say."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pydantic

from dist_reg.config import RunConfig
from dist_reg.errors import UserError, nearest

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


def read_ds_config(name: str, *, import_deepspeed: bool = True) -> dict[str, Any]:
    """The DeepSpeed configuration that `deepspeed:` names, as data.

    Without `import_deepspeed`, which takes seconds, the values inside `zero_optimization` are not held against DeepSpeed's
    own class, only their names and the stage. Raises UserError.
    """
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
    if not isinstance(config.get("optimizer", {}), dict):
        raise UserError(f'deepspeed: {path}: optimizer must be an object such as {{"type": "AdamW"}}.')
    for key in config:
        close = difflib.get_close_matches(key, DS_KEYS, n=1, cutoff=0.85)
        if close and key not in DS_KEYS:
            raise UserError(f"deepspeed: {path}: unknown key {key!r}; did you mean {close[0]!r}?")
    (_check_zero if import_deepspeed else _check_zero_names)(zero, path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.setdefault(key, "auto")
    # Left out, DeepSpeed clips at 1.0 whatever the run file says, and exports no weights under ZeRO-3.
    config.setdefault("gradient_clipping", "auto")
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config


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


def _check_zero_names(zero: dict[str, Any], path: Path) -> None:
    """Raise UserError for a name that is no field of DeepSpeed's class, read from its source, or a stage that is none."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is not None and spec.origin is not None:
        source = Path(spec.origin).with_name("runtime") / "zero" / "config.py"
        text = source.read_text(encoding="utf-8")
        known = re.findall(r"^    (\w+): .+=", text, re.MULTILINE) + re.findall(r'alias="(\w+)"', text)
        for key in zero:
            if key not in known:
                raise UserError(
                    f"deepspeed: {path}: zero_optimization.{key} is unknown; {nearest(key, known)}"
                )
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(
            f"deepspeed: {path}: zero_optimization.stage must be 0 to 3; it is {zero['stage']!r}."
        )


def check_agreement(run: RunConfig, train: dict[str, Any], config: dict[str, Any]) -> None:
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


def check_optimizer(optim: str, config: dict[str, Any]) -> None:
    """Raise UserError for an optimizer, the run's `train.optim` or the JSON's own, whose state ZeRO cannot shard."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage and "optimizer" in config:
        kind = str(config["optimizer"].get("type"))
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
