"""`dist-reg eval MODEL [key=value ...]`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dist_reg.config import RunConfig, load_run
from dist_reg.errors import UserError, reason
from dist_reg.rundir import RUN_FILE

OVERRIDES = ("task", "data", "model.trust_remote_code", "model.layers_path")


@click.command("eval")
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--run", "run_file", type=click.Path(path_type=Path), help="Run file that says task and data.")
@click.option("--out", type=click.Path(path_type=Path), help="File for the scores, as JSON.")
def command(model: Path, overrides: tuple[str, ...], run_file: Path | None, out: Path | None) -> None:
    """Evaluate MODEL, a run directory or an exported model, on its run's data.

    Overrides change task and data, such as task=sst2 data.data_dir=glue.
    """
    folder, found = locate(model)
    run_file = run_file or found
    if run_file is None:
        raise UserError(
            f"eval: {model} has no {RUN_FILE} beside it; give --run RUN.yaml, which says task and data."
        )
    for override in overrides:
        key = override.partition("=")[0]
        if key not in OVERRIDES and not key.startswith("data."):
            raise UserError(
                f"eval: {key} has no effect on an evaluation; what has is data.* and {', '.join(OVERRIDES)}."
            )
    scores = evaluate(folder, load_run(run_file, overrides))
    from dist_reg.run import say_scores

    say_scores(scores)
    if out is not None:
        try:
            out.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"eval: --out {out} cannot be written: {reason(error)}.") from None


def locate(model: Path) -> tuple[Path, Path | None]:
    """The exported model's folder and the run file that made it, if it lies where a run leaves it."""
    if (model / RUN_FILE).is_file():
        if not (model / "model").is_dir():
            raise UserError(
                f"eval: the run in {model} is not finished; dist-reg train {model / RUN_FILE} resumes it."
            )
        return model / "model", model / RUN_FILE
    if not model.is_dir():
        raise UserError(f"eval: folder {model} does not exist; give a run directory or an exported model.")
    beside = model.parent / RUN_FILE
    return model, beside if beside.is_file() else None


def evaluate(folder: Path, run: RunConfig) -> dict[str, dict[str, float]]:
    """Scores of the exported model in `folder` on every evaluation set of `run`, by set. Writes nothing."""
    import tempfile

    import torch
    import transformers

    from dist_reg.adapters import ADAPTER_FILE
    from dist_reg.config import ModelConfig
    from dist_reg.model import load_model, load_with_adapters
    from dist_reg.run import evaluate as evaluate_sets
    from dist_reg.run import positions, score
    from dist_reg.runtime import prepare_process
    from dist_reg.tasks import load_task
    from dist_reg.trainer import Trainer

    prepare_process(deepspeed=False)
    task = load_task(run.task, run.data)
    source = ModelConfig(name=str(folder), trust_remote_code=run.model.trust_remote_code)
    if (folder / ADAPTER_FILE).is_file():
        source = replace(run.model, name=str(folder))
        model, tokenizer = load_with_adapters(
            source, task.model_class, seed=0, single_words=task.single_words, **task.model_kwargs()
        )
    else:
        model, tokenizer = load_model(source, task.model_class, seed=0, single_words=task.single_words)
    fresh: Any = model.fresh_parameters
    if fresh:
        raise UserError(f"eval: {folder} holds no trained {fresh[0]}; give a fine-tuned model.")
    task.check_model(model, f"eval: {folder}")
    task = task.tokenize(tokenizer, task.length(run.data.max_length, tokenizer, positions(model)))
    with tempfile.TemporaryDirectory() as scratch:
        args = transformers.TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=int(run.train.get("per_device_eval_batch_size", 32)),
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model,
            args,
            layers_path=run.model.layers_path,
            data_collator=task.collator(tokenizer),
        )
        score(trainer, task)
        task.try_out(model, model, args.device)
        trainer.remove_callback(transformers.PrinterCallback)
        return evaluate_sets(trainer, task)
