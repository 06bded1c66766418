"""The batch arithmetic: batch_size = processes x micro-batch x accumulation."""

from __future__ import annotations

import pytest

from dist_reg.batch import cut_batch
from dist_reg.errors import UserError

MICRO, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("world", "train", "micro", "steps"),
    [
        (1, {}, 8, 1),
        (2, {}, 4, 1),
        (4, {}, 2, 1),
        (8, {}, 1, 1),
        (1, {STEPS: 4}, 2, 4),
        (2, {STEPS: 2}, 2, 2),
        (1, {MICRO: 2}, 2, 4),
        (4, {MICRO: 1}, 1, 2),
        (2, {MICRO: 2, STEPS: 2}, 2, 2),
    ],
)
def test_batch_is_cut_over_the_processes(world, train, micro, steps):
    assert cut_batch(8, world, train) == {MICRO: micro, STEPS: steps}


@pytest.mark.parametrize(
    ("world", "batch", "train"),
    [
        (3, 8, {}),
        (16, 8, {}),
        (1, 8, {STEPS: 3}),
        (1, 8, {STEPS: 16}),
        (2, 8, {MICRO: 3}),
        (1, 8, {MICRO: 16}),
        (2, 8, {MICRO: 2, STEPS: 4}),
        (1, 8, {STEPS: -2}),
        (1, 8, {STEPS: 0}),
        (1, 8, {MICRO: -4}),
        (1, 8, {MICRO: 0}),
        (1, 8, {MICRO: 0, STEPS: 0}),
        (1, 8, {MICRO: "four"}),
        (1, 8, {STEPS: "two"}),
        (1, 8, {MICRO: 4.0}),
        (1, 8, {STEPS: 2.0}),
    ],
)
def test_batch_that_does_not_divide_is_refused(world, batch, train):
    with pytest.raises(UserError) as error:
        cut_batch(batch, world, train)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(batch), f"({world})", *(str(value) for value in train.values())):
        assert part in message
