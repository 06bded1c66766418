"""Classification and regression of single sentences and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dist_reg.data.sampling import quantile_bins, sample_rows
from dist_reg.data.table import Table
from dist_reg.tasks.base import EXAMPLE_ID, Task
from dist_reg.tasks.metrics import check_finite, compute

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dist_reg.tasks.collator import Collator


@dataclass(frozen=True, kw_only=True)
class SequenceTask(Task):
    """A task of kind `classification` or `regression`.

    Data sets have the columns `text`, `text_pair` (for pairs), `label` (int64 class id, or float32) and
    `example_id` (int64).
    """

    label_names: tuple[str, ...]
    """Class names in the order of their ids; `("score",)` for regression."""
    merged: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By evaluation sets with fewer labels than training: what each class counts as there, see `merged_ids`."""

    model_class: ClassVar[str] = "AutoModelForSequenceClassification"

    @property
    def num_labels(self) -> int:
        """Outputs of the head: the number of classes, or 1."""
        return len(self.label_names)

    def model_kwargs(self) -> dict[str, Any]:
        """`num_labels`, `problem_type`, `id2label`, `label2id`."""
        classes = self.kind == "classification"
        return {
            "num_labels": self.num_labels,
            "problem_type": "single_label_classification" if classes else "regression",
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: i for i, name in enumerate(self.label_names)},
        }

    def encode(
        self, rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list[Any]]:
        """Token ids, mask and (where the tokenizer has them) token types, with `label`."""
        encoded = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)
        return {**encoded, "label": rows["label"]}

    def compute_metrics(self, predictions: Any, labels: Any, rows: Dataset) -> dict[str, float]:
        """Metrics of logits [N, C] against labels [N]; where classes count as others, of the likeliest class's, with the loss of
        the sum of their probabilities."""
        from scipy.special import logsumexp

        merged = self.merged.get(self.name_of(rows) or "")
        if merged is None or len(predictions) == 0:
            return super().compute_metrics(predictions, labels, rows)
        logits = np.asarray(predictions, dtype=np.float64)
        check_finite(logits)
        counts_as = np.array(merged)
        found = np.eye(len(merged))[counts_as[logits.argmax(-1)]]
        right = np.where(counts_as == np.asarray(labels)[:, None], logits, -np.inf)
        loss = float((logsumexp(logits, -1) - logsumexp(right, -1)).mean())
        return {**compute(self.metrics, found, labels), "loss": loss}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """A `Collator` with labels as int64 class ids or float32 scores."""
        import torch

        from dist_reg.tasks.collator import Collator

        dtype = torch.int64 if self.kind == "classification" else torch.float32
        return Collator(tokenizer=tokenizer, label_dtype=dtype)


def make_dataset(
    table: Table, labels: Sequence[float], kind: str, *, samples: int | None = None, seed: int = 0
) -> Dataset:
    """The data set of a sequence task from a table and its labels (class ids or scores), or a sample of it.

    Raises:
        UserError: a sample that cannot be drawn.
    """
    from datasets import Dataset, Features, Value

    rows: Sequence[int] = range(len(table))
    if samples is not None:
        strata = labels if kind == "classification" else quantile_bins(labels, samples)
        rows = sample_rows(strata, samples, seed=seed, name=table.source)
    names = [name for name in ("text", "text_pair") if name in table.columns]
    columns: dict[str, list[Any]] = {name: [table.columns[name][row] for row in rows] for name in names}
    columns["label"] = [labels[row] for row in rows]
    columns[EXAMPLE_ID] = list(rows)
    features = Features(
        {name: Value("string") for name in names}
        | {"label": Value("int64" if kind == "classification" else "float32"), EXAMPLE_ID: Value("int64")}
    )
    return Dataset.from_dict(columns, features=features)
