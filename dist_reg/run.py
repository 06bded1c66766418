"""One run, from a checked run file to results.json and an exported model in its run directory."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import click
import transformers
from accelerate.utils import broadcast_object_list
from transformers.trainer_callback import PrinterCallback

from dist_reg import checkpoint
from dist_reg.adapters import adapter_config, add_adapters, trained_share
from dist_reg.config import RunConfig
from dist_reg.ds_config import read_ds_config
from dist_reg.errors import UserError, nearest, reason
from dist_reg.export import export_model
from dist_reg.kept import FILE, kept_methods
from dist_reg.model import load_model
from dist_reg.progress import ProgressCallback
from dist_reg.provenance import provenance
from dist_reg.rundir import RunDirectory, plain
from dist_reg.runtime import is_main, prepare_process, world_size
from dist_reg.stop_callback import StopCallback
from dist_reg.stopping import current_request
from dist_reg.tasks import Task, load_task
from dist_reg.trainer import Trainer
from dist_reg.training_args import SETTING_ERRORS, check_settings, training_arguments

logger = logging.getLogger(__name__)


def train(run: RunConfig) -> dict[str, Any]:
    """Train, evaluate and export `run`; returns the content of its results.json.

    Resumes an unfinished run from its newest whole checkpoint and reports a finished one. Every process of a
    distributed run calls this. Raises UserError before anything is written where the run cannot be done.
    """
    prepare_process(deepspeed=run.deepspeed is not None)
    folder = RunDirectory(run.output_dir)
    try:
        folder.check(run)
    except UserError:
        # A mistake in the run file makes it a different run too; then the mistake is what to say.
        check_settings(run)
        load_task(run.task, run.data)
        raise
    done = folder.results()
    if done is not None:
        return report_finished(folder, done)
    task = load_task(run.task, run.data)
    args = training_arguments(
        run, folder.checkpoints, main_metric=task.main_metric, greater_is_better=task.greater_is_better
    )
    transformers.set_seed(args.seed)
    adapters = None if run.peft is None else adapter_config(run.peft, task.model_class)
    check_quantized(run)
    model, tokenizer = load_model(
        run.model, task.model_class, args.seed, single_words=task.single_words, **task.model_kwargs()
    )
    if adapters is not None:
        model = add_adapters(model, adapters, args.seed)
    check_fit(run, task, model, args)
    length = task.length(run.data.max_length, tokenizer, positions(model))
    with args.main_process_first(local=True, desc="tokenizing"):
        task = task.tokenize(tokenizer, length)
    rows: Any = task.train
    if task.source is not None:
        seed = args.seed if args.data_seed is None else args.data_seed
        rows = task.stream(tokenizer, length, seed=seed, buffer=run.data.shuffle_buffer or 10_000)
    trainer = build_trainer(run, task, model, tokenizer, args, folder, rows)
    trainer.accelerator.wait_for_everyone()
    with folder.begin(run) if is_main() else contextlib.nullcontext():
        trainer.accelerator.wait_for_everyone()
        # Only now is no other process at work in this folder.
        done = folder.results()
        if done is not None:
            return report_finished(folder, done)
        return train_in(folder, run, task, trainer, resumable(run, folder, args))


def report_finished(folder: RunDirectory, results: dict[str, Any]) -> dict[str, Any]:
    """Print the results of a run that was finished before, and return them."""
    say(f"{folder.path} holds this run, finished; its results:")
    say_scores(results["metrics"])
    return results


def train_in(
    folder: RunDirectory, run: RunConfig, task: Task, trainer: Trainer, resume: Path | None
) -> dict[str, Any]:
    """Train from `resume`, evaluate, export and write the results; the folder is this run's."""
    args = trainer.args
    say(describe(run, task, trainer))
    if resume is not None:
        say(f"resuming from {resume}")
    trainer.add_callback(ProgressCallback(folder.path))
    trainer.add_callback(StopCallback(current_request()))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - start
    steps = trainer.state.global_step - (checkpoint.step_of(resume) if resume else 0)
    trainer.remove_callback(transformers.EarlyStoppingCallback)
    metrics = evaluate(trainer, task)
    domains = task.by_domain(metrics)
    chosen = str(args.metric_for_best_model).removeprefix("eval_")
    results = {
        "task": task.name,
        "model": run.model.name,
        "model_config": run.model.config,
        "peft": run.peft,
        "methods": run.as_dict()["methods"],
        "seed": args.seed,
        "data_seed": run.data.seed,
        "train_examples": task.examples,
        "counts": {name: dict(counts) for name, counts in task.counts.items()},
        "settings": settings(run),
        "main_metric": task.main_metric,
        "main_metric_scale": "percent" if task.percent else "number",
        "greater_is_better": task.greater_is_better,
        "selection": f"best dev checkpoint by {chosen}" if args.load_best_model_at_end else "last step",
        "metrics": metrics,
        **({} if domains is None else {"domains": domains}),
        "timings": {
            "train_seconds": seconds,
            "steps": trainer.state.global_step,
            "seconds_per_step": seconds / max(1, steps),
            "resumed": resume is not None,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
        "terms": last_terms(trainer.state.log_history),
        "topology": {
            "processes": world_size(),
            "deepspeed": run.deepspeed,
            "micro_batch": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
        },
        **provenance(),
    }
    export_model(trainer, folder.model, results)
    if is_main():
        folder.finish(results)
    trainer.accelerator.wait_for_everyone()
    say_scores(metrics)
    if domains is not None:
        say(
            "  ".join(
                f"{key.replace('_', '-')} {domains[key]:.4f}" for key in ("in_domain", "out_of_domain", "gap")
            )
        )
    say(f"results in {folder.results_file}, model in {folder.model}")
    return results


def build_trainer(
    run: RunConfig,
    task: Task,
    model: Any,
    tokenizer: Any,
    args: transformers.TrainingArguments,
    folder: RunDirectory,
    rows: Any,
) -> Trainer:
    """The trainer of `run` with its callbacks; `task` is tokenized, and `rows` are those to train on."""
    try:
        trainer = Trainer(
            model,
            args,
            methods=run.build_methods(),
            layers_path=run.model.layers_path,
            train_dataset=rows,
            try_out=task.try_out,
            lengths=list(map(len, rows["input_ids"])) if run.data.group_by_length else None,
            eval_dataset=task.dev,
            data_collator=task.collator(tokenizer),
            processing_class=tokenizer,
        )
    except UserError:
        raise
    except SETTING_ERRORS as error:  # a logger that is not installed, say
        raise UserError(f"train: {reason(error)}") from None
    except OSError as error:
        if args.push_to_hub and not error.filename:
            raise UserError(f"train.push_to_hub: the hub cannot be used ({reason(error)}).") from None
        raise UserError(f"train.output_dir: {folder.path} cannot be created ({reason(error)}).") from None
    score(trainer, task)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogCallback(folder.log_file))
    if run.early_stopping is not None:
        stopping = run.early_stopping
        trainer.add_callback(transformers.EarlyStoppingCallback(stopping.patience, stopping.threshold))
    return trainer


def score(trainer: Trainer, task: Task) -> None:
    """Let the evaluations of `trainer` keep what `task` needs of the logits, and compute its metrics."""
    trainer.preprocess_logits_for_metrics = task.reduce

    def metrics(prediction: Any) -> dict[str, float]:
        return task.compute_metrics(prediction.predictions, prediction.label_ids, trainer.evaluated_rows)

    trainer.compute_metrics = metrics


def check_fit(run: RunConfig, task: Task, model: Any, args: transformers.TrainingArguments) -> None:
    """Raise UserError where run file, task and model do not go together."""
    known = (*task.metrics, "loss")
    if str(args.metric_for_best_model).removeprefix("eval_") not in known:
        hint = nearest(str(args.metric_for_best_model), known)
        raise UserError(
            f"train.metric_for_best_model: {task.name} has no {args.metric_for_best_model!r}; {hint}"
        )
    listed = [name for entry in run.methods for name in entry]
    for name in kept_methods(model):
        if name not in listed:
            raise UserError(
                f"methods: {run.model.name} has {name}, which stays in it; list it, with the options in {FILE} beside the weights."
            )


def positions(model: Any) -> int | None:
    """How many tokens the model has positions for, where it says so."""
    return getattr(model.config, "max_position_embeddings", None)


def check_quantized(run: RunConfig) -> None:
    """Raise UserError where DeepSpeed would have to shard weights of 4 or 8 bits."""
    if run.model.quantize is None or run.deepspeed is None:
        return
    stage = read_ds_config(run.deepspeed).get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        raise UserError(
            f"model.quantize: {run.deepspeed} shards weights, which those of {run.model.quantize} do not allow; use zero2."
        )


def resumable(run: RunConfig, folder: RunDirectory, args: transformers.TrainingArguments) -> Path | None:
    """The checkpoint to resume from, if any; one process reads it through and tells the others.

    Raises UserError when ZeRO cannot load it on this many processes.
    """
    found: list[Any] = [None]
    if is_main():
        best = args.load_best_model_at_end
        found = [checkpoint.newest_whole(folder.checkpoints, with_best=best, contents=True)]
    resume: Path | None = broadcast_object_list(found)[0]
    if resume is not None and run.deepspeed is not None and checkpoint.processes(resume) != world_size():
        raise UserError(
            f"{resume} was written by {checkpoint.processes(resume)} processes and this run has {world_size()}; "
            "DeepSpeed resumes on the same number."
        )
    return resume


def settings(run: RunConfig) -> dict[str, Any]:
    """What two runs must share to be averaged: everything but seed, folder and topology."""
    whole = plain(run.as_dict())
    free = ("seed", "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps")
    train = {key: value for key, value in whole["train"].items() if key not in free}
    data = {key: value for key, value in whole["data"].items() if value is not None and key != "seed"}
    return {
        "model_revision": run.model.revision,
        "weights": {"dtype": run.model.dtype, "quantize": run.model.quantize, "peft": run.peft},
        "batch_size": run.batch_size,
        "train": train,
        "data": data,
        "early_stopping": whole["early_stopping"],
    }


def evaluate(trainer: Trainer, task: Task) -> dict[str, dict[str, float]]:
    """Metrics of every evaluation set of `task` (tokenized), by set."""
    metrics = {}
    sets: dict[str, Any] = task.evaluation_sets
    for name, rows in sets.items():
        found = trainer.evaluate(rows, metric_key_prefix=name)
        known = [metric for metric in (*task.metrics, "loss") if f"{name}_{metric}" in found]
        metrics[name] = {metric: found[f"{name}_{metric}"] for metric in known}
    return metrics


class LogCallback(transformers.TrainerCallback):
    """Every log line as data in `log.jsonl`, and as a plain line where there is no progress bar."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, **logs}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({reason(error)}).") from None
        if args.disable_tqdm and ("loss" in logs or any(name.endswith("_loss") for name in logs)):
            click.echo(plain_line(line, state.max_steps))


def plain_line(line: dict[str, Any], max_steps: int) -> str:
    """One log line for a batch log."""
    hidden = ("step", "epoch", "total_flos", "_runtime", "_per_second")
    shown = [f"{name} {value:.4g}" for name, value in line.items() if not name.endswith(hidden)]
    return f"step {line['step']}/{max_steps} epoch {line.get('epoch', 0):.2f}  " + "  ".join(shown)


def describe(run: RunConfig, task: Task, trainer: Trainer) -> str:
    """What is about to be trained, in one line."""
    args = trainer.args
    methods = ", ".join(method.name for method in trainer.handle.methods) or "plain fine-tuning"
    examples = f"{task.examples} examples" if task.source is None else f"a stream of {task.source.name}"
    adapters = "" if run.peft is None else f", adapters: {trained_share(trainer.handle.model)}"
    return (
        f"{task.name}: {examples}, {run.model.name}{adapters}, {methods}; batch {run.batch_size} = "
        f"{args.world_size} processes x {args.per_device_train_batch_size} x {args.gradient_accumulation_steps}, "
        f"{run.deepspeed or 'no deepspeed'}, gradients clipped at {args.max_grad_norm}"
    )


def last_terms(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last logged value of every loss term and method metric."""
    known = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    lines = [line for line in history if "loss" in line]
    return {name: value for name, value in lines[-1].items() if name not in known} if lines else {}


def say_scores(metrics: dict[str, dict[str, float]]) -> None:
    """Print the scores of every evaluation set."""
    for name, scores in metrics.items():
        say(f"{name}: " + "  ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))


def say(text: str) -> None:
    """Print a line on the main process only."""
    if is_main():
        click.echo(text)
