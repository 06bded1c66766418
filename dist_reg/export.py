"""Export a trained model: plain weights, configuration, tokenizer and a card, loadable without this project."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_reg.errors import UserError, reason
from dist_reg.methods import METHODS

if TYPE_CHECKING:
    from dist_reg.trainer import Trainer

logger = logging.getLogger(__name__)


def export_model(trainer: Trainer, folder: Path, results: dict[str, Any]) -> None:
    """Write the model of `trainer` to `folder`, whole or not at all; every process calls this (ZeRO-3 gathers)."""
    chosen = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    if (chosen or trainer.state.global_step) <= trainer.warmup_steps > 0:
        logger.warning(
            "the warm-up of %s never ended, so nothing but its modules was trained, and they stay behind: the exported "
            "model is the pretrained one with an untrained head.",
            ", ".join(method.name for method in trainer.handle.methods if method.epochs_alone()),
        )
    trainer.handle.bake()
    partial = folder.with_name(f".{folder.name}.partial")
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(partial))
        if trainer.args.should_save:
            (partial / "training_args.bin").unlink(missing_ok=True)
            if not any(partial.glob("*.safetensors")):
                raise OSError("no weights were written")
            (partial / "README.md").write_text(model_card(results), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(partial, folder)
    except KeyboardInterrupt:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the model could not be exported to {folder} ({reason(error)}); run the same command again to resume."
        ) from error
    trainer.accelerator.wait_for_everyone()


def _how_to_load(results: dict[str, Any]) -> list[str]:
    if results.get("peft"):
        return [
            "These are adapters for the base model; with PEFT installed the `Auto` classes of `transformers` load both (a head of",
            "other than two labels needs `num_labels`). Of the training methods, nothing is left in them but what `dist_reg.json`,",
            "if it is there, describes.",
        ]
    kept = [name for entry in results["methods"] for name in entry if METHODS[name].kept]
    if not kept:
        return [
            "Nothing of the training methods is left in these weights; load them with the `Auto` classes of",
            "`transformers`.",
        ]
    return [
        f"{', '.join(kept)} stays in this model: load it with `dist_reg.load(folder)`. The `Auto` classes of",
        "`transformers` load backbone and head without it, which is another and a worse model.",
    ]


def model_card(results: dict[str, Any]) -> str:
    """The card of an exported model, from its run's results."""
    methods = [f"{name} {options}" for entry in results["methods"] for name, options in entry.items()]
    rows = [
        f"| {name} | " + ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items()) + " |"
        for name, scores in results["metrics"].items()
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [dist-reg]",
            "---",
            "",
            f"# {results['task']}, fine-tuned with dist-reg",
            "",
            f"- base model: {Path(results['model']).name}",
            f"- methods: {'; '.join(methods) or 'plain fine-tuning'}",
            f"- training examples: {results['train_examples']}, seed {results['seed']}, "
            f"sample seed {results['data_seed']}",
            f"- selection: {results['selection']}",
            f"- made on {results['date']} with "
            + ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
            "",
            "| evaluation set | scores |",
            "|---|---|",
            *rows,
            "",
            *_how_to_load(results),
            "",
        ]
    )
