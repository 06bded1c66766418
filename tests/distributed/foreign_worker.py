"""Trains the same regularised tiny model in loops that are not ours and writes their losses; see test_foreign.py."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from dist_reg import HyPe, example_keys, regularize
from dist_reg.runtime import is_main, leave, prepare_process
from tests.distributed.parity_worker import collate, ds_config, examples
from tests.models import build

STEPS, BATCH, RATE, SIGMA = 5, 8, 0.1, 0.05


def batches() -> list[dict[str, torch.Tensor]]:
    rows, found = examples(), []
    for step in range(STEPS):
        batch = collate(rows[step * BATCH : (step + 1) * BATCH])
        batch["example_keys"] = example_keys(batch.pop("example_ids"), 0)
        found.append(batch)
    return found


def regularised() -> torch.nn.Module:
    model = build("bert", dropout=0.0, num_labels=2)
    regularize(model, [HyPe(sigma=SIGMA)], seed=7)
    return model


def by_hand() -> list[float]:
    model, losses = regularised(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_accelerate() -> list[float]:
    accelerator, model, losses = Accelerator(cpu=not torch.cuda.is_available()), regularised(), []
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    for batch in batches():
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_transformers() -> list[float]:
    fields = {"learning_rate": RATE, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    with tempfile.TemporaryDirectory() as scratch:
        args = transformers.TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=1,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            **fields,
        )
        trainer = transformers.Trainer(
            regularised(), args, train_dataset=batches(), data_collator=lambda rows: dict(rows[0])
        )
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def with_deepspeed(stage: int) -> list[float]:
    import deepspeed

    model, losses = regularised(), []
    config = {
        **ds_config(stage),
        "train_micro_batch_size_per_gpu": BATCH,
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for batch in batches():
        loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


LOOPS: dict[str, Callable[[], list[float]]] = {
    "by hand": by_hand,
    "accelerate": with_accelerate,
    "transformers": with_transformers,
    "deepspeed zero 0": lambda: with_deepspeed(0),
    "deepspeed zero 2": lambda: with_deepspeed(2),
    "deepspeed zero 3": lambda: with_deepspeed(3),
}


def main() -> None:
    prepare_process(deepspeed=True)
    losses = {}
    for name, loop in LOOPS.items():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        losses[name] = loop()
    if is_main():
        Path(sys.argv[1]).write_text(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main()
