"""Trains a tiny model in every cell it is given and writes the logged losses. Started by test_parity.py.

parity_worker.py FOLDER CELLS.json OUT.json      (under torchrun for more than one process)
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState

from dist_reg import HIRE, LNSR, MVCR, R3F, HyPe, NEFTune, RDrop, Trainer, layer_noise
from dist_reg.config import ModelConfig, RunConfig
from dist_reg.model import load_model
from dist_reg.runtime import is_main, leave, prepare_process, world_size
from dist_reg.training_args import activation_checkpointing_field, training_arguments

STEPS, BATCH, EXAMPLES = 20, 8, 44
METHODS = {
    "plain": [],
    "hype": [HyPe(sigma=0.05)],
    "lnsr": [LNSR(sigma=0.1, layer=1)],
    "lnsr, tangent": [LNSR(sigma=0.1, noise="tangent", layer_weights="linear")],
    "lnsr, neighbour": [LNSR(sigma=0.1, noise="neighbour")],
    "hype, lnsr, secant": [HyPe(sigma=0.05, site="both"), LNSR(sigma=0.1, noise="secant")],
    "hype, rdrop": [HyPe(sigma=0.3), RDrop(alpha=2.0)],
    "hype, r3f": [HyPe(sigma=0.05), R3F(sigma=0.1)],
    "mvcr": [MVCR(warmup_epochs=1, learning_rate_multiple=3.0)],
    "mvcr, position, lnsr": [
        MVCR(per="position", site="ffn", reconstruct="sampled", warmup_epochs=1, learning_rate_multiple=3.0),
        LNSR(sigma=0.1, layer=1),
    ],
    "neftune, lnsr": [NEFTune(alpha=1.0), LNSR(sigma=0.1, layer=1)],
    "hire": [HIRE()],
    "hype, lnsr, hire": [
        HyPe(sigma=0.05),
        LNSR(sigma=0.1, layer=1),
        HIRE(extractor="attention", include_embeddings=True),
    ],
    "mvcr, hire": [
        MVCR(reconstruct="sampled", warmup_epochs=1, learning_rate_multiple=3.0),
        HIRE(fusion_rnn=False, normalisation="softmax"),
    ],
}
"""What a cell may train with; without dropout it is HyPe's noise that tells RDrop's draws apart."""


def examples(vocabulary: int = 100) -> list[dict]:
    """Token sequences of different lengths with a label that depends on them."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(EXAMPLES):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        tokens = torch.randint(5, vocabulary, (length,), generator=generator)
        rows.append(
            {"input_ids": tokens.tolist(), "label": int(tokens.sum() % 2), "example_id": 1000 + 7 * index}
        )
    return rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor([row["label"] for row in rows]),
        "example_ids": torch.tensor([row["example_id"] for row in rows]),
    }


def train(folder: Path, cell: dict) -> list[float]:
    """The logged loss of every step."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    adam = cell["optimizer"] == "adamw"
    fields = {
        "gradient_accumulation_steps": cell["accumulation"],
        activation_checkpointing_field(): cell["checkpointing"],
        "optim": "adamw_torch" if adam else "sgd",
        "learning_rate": 1e-3 if adam else 0.1,
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 11,
    }
    with tempfile.TemporaryDirectory() as scratch:
        deepspeed = None
        if cell["stage"] is not None:
            deepspeed = str(Path(scratch) / "ds.json")
            Path(deepspeed).write_text(json.dumps(ds_config(cell["stage"])))
        run = RunConfig(model=ModelConfig(name="-"), batch_size=BATCH, train=fields, deepspeed=deepspeed)
        args = training_arguments(run, Path(scratch), main_metric="loss", greater_is_better=False)
        source = ModelConfig(name=str(folder / cell["model"]))
        model, _ = load_model(source, "AutoModelForSequenceClassification", seed=11, num_labels=2)
        methods = METHODS[cell["methods"]]
        trainer = Trainer(model, args, methods=methods, train_dataset=examples(), data_collator=collate)
        for callback in (transformers.PrinterCallback, transformers.trainer_callback.ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        trainer.handle.remove()
    del trainer, model
    gc.collect()
    return losses


def ds_config(stage: int) -> dict:
    keys = (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "train_batch_size",
        "gradient_clipping",
    )
    return {**dict.fromkeys(keys, "auto"), "zero_optimization": {"stage": stage}}


def count_calls(fused: list[int]) -> None:
    """Add to the last number whenever a norm adds noise."""

    def counting(operation):
        def call(*args, **kwargs):
            fused[-1] += 1
            return operation(*args, **kwargs)

        return call

    layer_noise.layer_norm_perturb = counting(layer_noise.layer_norm_perturb)
    layer_noise.perturb_rms_norm = counting(layer_noise.perturb_rms_norm)


def main() -> None:
    folder, cells, out = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    prepare_process(deepspeed=any(cell["stage"] is not None for cell in cells))
    losses, fused = [], []
    count_calls(fused)
    for cell in cells:
        fused.append(0)
        losses.append(train(folder, cell))
    if is_main():
        out.write_text(json.dumps({"world_size": world_size(), "losses": losses, "fused": fused}))
    leave()


if __name__ == "__main__":
    main()
