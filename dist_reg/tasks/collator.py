"""Batches of tokenized rows, with the ids that the noise is keyed by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dist_reg.errors import UserError
from dist_reg.streams import IGNORED, SPAN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads a list of rows and returns tensors.

    Out: the tokenizer's inputs [B, T], `labels` of `label_dtype` (where rows have `label`), [B], or [B, T] padded with -100
    where a row has one for every token, `start_positions` and `end_positions` int64 [B] (where rows have them), and
    `example_ids` int64 [B].

    Raises:
        UserError: the tokenizer has no padding token, or a row has no `example_id` (a trainer with
            `remove_unused_columns` on drops the column unless it is told to keep it).
    """

    tokenizer: PreTrainedTokenizerBase
    label_dtype: torch.dtype = torch.int64
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None
    """`left` or `right`; the tokenizer's own if not given."""
    length: int | None = None
    """Pad every batch to this many tokens; to its longest row if not given."""

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token is None:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path} has no padding token; "
                "set tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id"
            )

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if not all("example_id" in row for row in features):
            raise UserError(
                "the batch has no column 'example_id', which keys the noise; "
                "set remove_unused_columns to false"
            )
        inputs = self.tokenizer.model_input_names
        rows = [{k: v for k, v in row.items() if k in inputs} for row in features]
        batch: dict[str, Any] = dict(
            self.tokenizer.pad(
                rows,
                padding="longest" if self.length is None else "max_length",
                max_length=self.length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                padding_side=self.padding_side,
                return_tensors="pt",
            )
        )
        if "label" in features[0]:
            labels = [row["label"] for row in features]
            if isinstance(labels[0], list):
                labels = [self._padded(label, batch["input_ids"].shape[1]) for label in labels]
            batch["labels"] = torch.tensor(labels, dtype=self.label_dtype)
        for name in SPAN:
            if name in features[0]:
                batch[name] = torch.tensor([row[name] for row in features], dtype=torch.int64)
        batch["example_ids"] = torch.tensor([row["example_id"] for row in features], dtype=torch.int64)
        return batch

    def _padded(self, label: list[int], length: int) -> list[int]:
        """On the side on which the inputs are padded."""
        padding = [IGNORED] * (length - len(label))
        side = self.padding_side or self.tokenizer.padding_side
        return padding + label if side == "left" else label + padding
