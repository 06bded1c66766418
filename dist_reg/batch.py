"""How a batch is cut: `batch_size` = processes x micro-batch x accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_reg.errors import UserError


def cut_batch(batch_size: int, processes: int, train: Mapping[str, Any]) -> dict[str, int]:
    """Micro-batch and accumulation, as fields of TrainingArguments, whose product over `processes` is `batch_size`.

    What `train` leaves open is computed, accumulation being 1 where both are. Raises UserError.
    """
    micro = train.get("per_device_train_batch_size")
    steps = train.get("gradient_accumulation_steps")
    if any(given is not None and (not isinstance(given, int) or given < 1) for given in (micro, steps)):
        rest = 1
    elif micro is None:
        steps = steps or 1
        micro, rest = divmod(batch_size, processes * steps)
    elif steps is None:
        steps, rest = divmod(batch_size, processes * micro)
    else:
        rest = batch_size - processes * micro * steps
    if rest or not micro or not steps:
        raise UserError(
            f"batch_size {batch_size} is not processes ({processes}) x micro-batch "
            f"({train.get('per_device_train_batch_size', 'free')}) x accumulation "
            f"({train.get('gradient_accumulation_steps', 'free')}); choose numbers whose product it is."
        )
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
