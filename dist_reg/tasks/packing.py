"""Several examples in one row: which ones, and the batches of such rows.

A row is told apart by its position ids, which begin anew with every example: Transformers' attention masks then let no token
see another example (`find_packed_sequence_indices` in its masking_utils), and rotary or learned positions are those of the
example alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dist_reg.errors import UserError
from dist_reg.streams import IGNORED
from dist_reg.tasks.base import EXAMPLE_ID

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples share a row of `capacity` tokens, by best-fit decreasing: at most 11/9 of the rows needed, plus one.

    Examples of a row are in the order of the set, and rows in that of their first example: a function of the lengths alone.
    """
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    found: list[list[int]] = []
    for example in sorted(range(len(lengths)), key=lambda example: (-lengths[example], example)):
        length = lengths[example]
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            found.append([])
            room, number = capacity, len(found) - 1
        else:
            room, number = rooms.pop(place)
        found[number].append(example)
        bisect.insort(rooms, (room - length, number))
    return sorted(sorted(own) for own in found)


def pack(rows: Dataset, capacity: int) -> Dataset:
    """The tokenized examples `rows` (`input_ids`, `label`, `example_id`), several in a row of at most `capacity` tokens.

    A row has the id of its first example, and `position_ids`. The first token of an example has no label: nothing of its own
    stands before it.
    """
    from datasets import Dataset

    columns = (rows["input_ids"], rows["label"], rows[EXAMPLE_ID])
    examples = [
        {"input_ids": ids, "label": label, EXAMPLE_ID: own} for ids, label, own in zip(*columns, strict=True)
    ]
    return Dataset.from_list(pack_rows(examples, capacity))


def pack_rows(rows: Sequence[dict[str, Any]], capacity: int) -> list[dict[str, Any]]:
    """As `pack`, of rows one by one."""
    return [
        {
            "input_ids": [token for example in own for token in rows[example]["input_ids"]],
            "label": [label for example in own for label in (IGNORED, *rows[example]["label"][1:])],
            "position_ids": [place for example in own for place in range(len(rows[example]["input_ids"]))],
            EXAMPLE_ID: rows[own[0]][EXAMPLE_ID],
        }
        for own in bins([len(row["input_ids"]) for row in rows], capacity)
    ]


EXAMPLE = 4
"""Tokens of an example in the rows by which a model is tried."""
NOISE = 1e-6
"""Part of the largest logit by which two that should be equal may differ."""


@torch.no_grad()
def try_model(model: Any, vocabulary: int, device: torch.device, *, packed: bool) -> None:
    """Run `model`, as it will be trained, on two rows of two short examples each, and see who sees whom.

    Raises:
        UserError: a token sees one behind it, so that it would be shown what it is to predict; or, where rows are to be `packed`,
            one example sees another.
    """
    training = model.training
    model.eval()
    try:
        whole = torch.arange(4 * EXAMPLE, device=device).view(2, -1) % max(2, vocabulary // 2)
        places = torch.arange(EXAMPLE, device=device).repeat(2, 2)

        def logits(rows: torch.Tensor) -> torch.Tensor:
            more = {"position_ids": places} if packed else {}
            return model(input_ids=rows, use_cache=False, **more).logits.float()

        before = logits(whole)
        least = NOISE * before.abs().max()
        other_end, other_start = whole.clone(), whole.clone()
        other_end[:, -1] += 1
        other_start[:, :EXAMPLE] += 1
        if (logits(other_end) - before)[:, :-1].abs().max() > least:
            raise UserError(
                "model: a token sees those behind it, and so what it is to predict: it is an encoder; task lm needs a decoder."
            )
        if packed and (logits(other_start) - before)[:, EXAMPLE:].abs().max() > least:
            raise UserError(
                "data.lm.packing: this model, or its attention, lets the examples of a row see each other; set packing: false, or "
                "attn_implementation sdpa under model.config."
            )
    finally:
        model.train(training)


@dataclass(frozen=True, kw_only=True)
class PackedCollator:
    """Batches of packed rows.

    Out: `input_ids`, `labels` (padded with -100) and `position_ids` [B, T], `row_spans` int32 [B, 2] in place of an attention
    mask (with which Transformers would not tell examples apart), `example_ids` int64 [B]. Padding is an example of its own
    behind the others.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in features)
        pad = self.tokenizer.pad_token_id
        missing = [longest - len(row["input_ids"]) for row in features]
        return {
            "input_ids": torch.tensor([row["input_ids"] + [pad] * n for row, n in zip(features, missing)]),
            "labels": torch.tensor([row["label"] + [IGNORED] * n for row, n in zip(features, missing)]),
            "position_ids": torch.tensor(
                [row["position_ids"] + list(range(n)) for row, n in zip(features, missing)]
            ),
            "row_spans": torch.tensor([[0, longest - n] for n in missing], dtype=torch.int32),
            "example_ids": torch.tensor([row[EXAMPLE_ID] for row in features], dtype=torch.int64),
        }
