"""Batches: padding, label dtypes, example ids."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from dist_reg.data.config import DataConfig
from dist_reg.errors import UserError
from dist_reg.tasks import Collator, load_task
from tests.tiny import save_tiny, tokenizer

ROWS = [
    {"input_ids": [1, 4, 2], "attention_mask": [1, 1, 1], "label": 1, "example_id": 2**40 + 3},
    {"input_ids": [1, 4, 5, 6, 2], "attention_mask": [1] * 5, "label": 0, "example_id": 7},
]


def test_batch_is_padded_and_carries_ids():
    batch = Collator(tokenizer=tokenizer())(ROWS)
    assert batch["input_ids"].tolist() == [[1, 4, 2, 0, 0], [1, 4, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64
    assert batch["example_ids"].tolist() == [2**40 + 3, 7]
    assert batch["example_ids"].dtype == torch.int64
    assert set(batch) <= {"input_ids", "attention_mask", "token_type_ids", "labels", "example_ids"}
    assert ROWS[0]["example_id"] == 2**40 + 3, "the rows themselves stay as they are"


def test_regression_labels_are_floats_even_when_they_look_like_integers():
    batch = Collator(tokenizer=tokenizer(), label_dtype=torch.float32, pad_to_multiple_of=8)(ROWS)
    assert batch["labels"].dtype == torch.float32
    assert batch["input_ids"].shape == (2, 8)


def test_rows_without_labels_or_ids():
    bare = [{k: v for k, v in row.items() if k != "label"} for row in ROWS]
    assert "labels" not in Collator(tokenizer=tokenizer())(bare)
    with pytest.raises(UserError, match="no column 'example_id'.*set remove_unused_columns to false"):
        Collator(tokenizer=tokenizer())([{"input_ids": [1], "attention_mask": [1], "label": 0}])


def test_tokenizer_without_padding():
    plain = tokenizer()
    plain.pad_token = None
    with pytest.raises(UserError, match="no padding token; set tokenizer.pad_token"):
        Collator(tokenizer=plain)


def test_a_trainer_gets_the_ids(tmp_path):
    from transformers import AutoModelForSequenceClassification

    task = load_task("demo", DataConfig(train_samples=8))
    folder = save_tiny(tmp_path / "model", head="base")
    task = task.tokenize(tokenizer(), 16)
    seen: list[int] = []

    class Spy(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            seen.extend(inputs.pop("example_ids").tolist())
            return super().compute_loss(model, inputs, **kwargs)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, **task.model_kwargs())
    collator = task.collator(tokenizer())
    Spy(model, arguments, train_dataset=task.train, data_collator=collator).train()
    assert sorted(seen) == task.train["example_id"]
