"""What added modules ask of the optimizer: a rate of their own, and a warm-up in which they alone learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dist_reg.errors import UserError

MULTIPLE = "learning_rate_multiple"
"""The key that marks the parameter groups of added modules."""


def split_groups(optimizer: Optimizer, multiples: Mapping[nn.Parameter, float]) -> None:
    """Move the parameters in `multiples` to groups of their own, with so many times the rate of the group they leave.

    For an optimizer that has taken no step. Raises UserError where it does not hold them.
    """
    missing = set(multiples)
    for group in list(optimizer.param_groups):
        moved: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter in multiples:
                moved.setdefault(multiples[parameter], []).append(parameter)
        missing.difference_update(*moved.values())
        group["params"] = [parameter for parameter in group["params"] if parameter not in multiples]
        options = {key: value for key, value in group.items() if key != "params"}
        for multiple, parameters in moved.items():
            rate = {"lr": group["lr"] * multiple, MULTIPLE: multiple}
            optimizer.add_param_group({**options, **rate, "params": parameters})
    if missing:
        raise UserError(
            f"train.optim: {type(optimizer).__name__} does not hold the parameters that a method added; use adamw_torch."
        )


def after_warm_up(scheduler: LRScheduler, optimizer: Optimizer, steps: int) -> LambdaLR:
    """`scheduler` beginning after `steps` steps, in which the model's own groups stand still and the added ones do not.

    Raises UserError for a schedule that is not a function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            f"train.lr_scheduler_type: {type(scheduler).__name__} cannot begin after a warm-up of added modules; use linear, "
            "cosine or constant, or set warmup_epochs: 0."
        )

    def delayed(schedule: Any, during: float) -> Any:
        return lambda step: during if step < steps else schedule(step - steps)

    schedules = [
        delayed(schedule, float(MULTIPLE in group))
        for schedule, group in zip(scheduler.lr_lambdas, optimizer.param_groups)
    ]
    return LambdaLR(optimizer, schedules)


def start_anew(optimizer: Any) -> None:
    """Let the optimizer forget what it kept of the model's own parameters, which stood still with gradients of zero.

    Adam's moments are 0 then, but it has counted the steps, without which the first ones would be up to six times too
    large. What is forgotten is made again at the next step, as in a new optimizer.
    """
    zero, base = optimizer, optimizer
    while hasattr(base, "optimizer"):
        zero, base = base, base.optimizer
    for number, group in enumerate(base.param_groups):
        if MULTIPLE in group:
            continue
        if isinstance(group.get("step"), int):
            group["step"] = 0
        for parameter in _parameters(zero, group, number):
            base.state.pop(parameter, None)


def _parameters(zero: Any, group: dict[str, Any], number: int) -> list[torch.Tensor]:
    """What the optimizer keeps its state by; ZeRO-3 holds the flat partitions of a group apart from it."""
    partitions = getattr(zero, "sub_group_to_group_id", None)
    if partitions is None:
        return group["params"]
    return [zero.fp32_partitioned_groups_flat[i] for i, own in partitions.items() if own == number]
