"""`dist-reg diagnose MODEL [--data TASK] [key=value ...]`: how stable the layers of a model are under noise."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dist_reg.config import ModelConfig, apply_override, load_run, read_yaml, validate
from dist_reg.data.config import DataConfig
from dist_reg.errors import UserError, make_folder, reason
from dist_reg.rundir import RUN_FILE


@click.command("diagnose")
@click.argument("model", metavar="MODEL")
@click.argument("overrides", metavar="[data.KEY=VALUE]...", nargs=-1)
@click.option(
    "--data", "source", help="A task's name, or a text file of one sentence a line. Default: the run's."
)
@click.option(
    "--before", help="The model before fine-tuning, shown beside it. Default: the run's base model."
)
@click.option("--size", default=0.05, help="Norm of the noise as a share of each token's.")
@click.option("--examples", default=64, type=click.IntRange(min=1), help="Examples of the development set.")
@click.option("--layers-path", help="Dotted path of the layers, where a model has several stacks.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for stability.csv, .json and .png.")
def command(
    model: str,
    overrides: tuple[str, ...],
    source: str | None,
    before: str | None,
    size: float,
    examples: int,
    layers_path: str | None,
    out: Path | None,
) -> None:
    """Inject noise at each layer of MODEL in turn and show the relative error at every layer above.

    MODEL is a run directory, an exported model, a hub name or minilm. Overrides change the data, such as
    --data sst2 data.data_dir=glue.
    """
    if not 0 < size < float("inf"):
        raise UserError(f"--size must be a finite number above 0, for example 0.05; it is {size}.")
    settings = ModelConfig(name=model, layers_path=layers_path)
    names = {"": model}
    if (Path(model) / RUN_FILE).is_file():
        from dist_reg.cli.eval import locate

        folder, _ = locate(Path(model))
        run = load_run(Path(model) / RUN_FILE)
        names = {"before": before or run.model.name, "after": str(folder)}
        settings = dataclasses.replace(run.model, layers_path=layers_path or run.model.layers_path)
    elif before is not None:
        names = {"before": before, "after": model}
    sentences = read_sentences(model, source, overrides)
    if out is not None:
        make_folder(out, "--out")
    curves = {
        when: measure(dataclasses.replace(settings, name=name), sentences, size, examples)
        for when, name in names.items()
    }
    for when, found in curves.items():
        show(when, found)
    Console().print(
        f"Noise of {size:.1%} of each token's norm enters layer (row); relative error of the hidden state that leaves "
        f"each layer (column), mean over the real tokens of {min(examples, len(sentences))} examples.",
        highlight=False,
    )
    if out is not None:
        write(curves, size, out)
        click.echo(f"written to {out}")


def read_sentences(model: str, source: str | None, overrides: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Texts, or pairs of texts, to run through the model."""
    if source is not None and Path(source).is_file():
        if overrides:
            raise UserError(f"diagnose: {overrides[0]} has no effect on a text file; leave it out.")
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data {source} cannot be read as text: {reason(error)}.") from None
        found: list[tuple[str, ...]] = [(line,) for line in lines if line.strip()]
        if not found:
            raise UserError(f"--data {source} holds no sentence; give a text file of one sentence a line.")
        return found
    from dist_reg.tasks import load_task

    raw: dict[str, Any] = {"data": {}}
    run_file = Path(model) / RUN_FILE
    if source is None:
        if not run_file.is_file():
            raise UserError(
                "diagnose: --data is missing; give a task's name or a text file of one sentence a line."
            )
        raw = read_yaml(run_file)
        source = raw["task"]
    for override in overrides:
        if not override.startswith("data."):
            raise UserError(f"diagnose: {override.partition('=')[0]} has no effect here; what has is data.*.")
        apply_override(raw, override)
    task = load_task(source, validate(DataConfig, raw["data"], where="data"))
    columns = [name for name in ("text", "text_pair") if name in task.dev.column_names]
    return list(zip(*(task.dev[name] for name in columns)))


def measure(
    settings: ModelConfig, sentences: list[tuple[str, ...]], size: float, examples: int
) -> list[list[float]]:
    """The stability curves of a model, [L][L + 1]."""
    import torch

    from dist_reg.diagnosis import stability_curves
    from dist_reg.model import load_model
    from dist_reg.runtime import prepare_process

    prepare_process(deepspeed=False)
    loaded, tokenizer = load_model(settings, "AutoModel", seed=0)
    model: Any = loaded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    positions = getattr(model.config, "max_position_embeddings", None) or 128
    limit = min(128, tokenizer.model_max_length, positions)
    batches = []
    for start in range(0, min(examples, len(sentences)), 16):
        columns = [list(texts) for texts in zip(*sentences[start : min(start + 16, examples)])]
        batch: Any = tokenizer(*columns, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        batches.append({key: batch[key].to(device) for key in ("input_ids", "attention_mask")})
    return stability_curves(model.to(device), batches, size, layers_path=settings.layers_path).tolist()


def show(when: str, curves: list[list[float]]) -> None:
    """One model's table."""
    states = range(len(curves) + 1)
    table = Table(f"{when} enters".strip(), *(f"h{state}" for state in states), box=None, pad_edge=False)
    for layer, row in enumerate(curves):
        table.add_row(f"layer {layer}", *("" if value != value else f"{value:.4f}" for value in row))
    Console().print(table, highlight=False)


def write(curves: dict[str, list[list[float]]], size: float, out: Path) -> None:
    """stability.csv, stability.json with provenance, and stability.png in the folder `out`."""
    from dist_reg.provenance import provenance

    with (out / "stability.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "noise_enters_layer", "state", "relative_error"])
        for when, rows in curves.items():
            for layer, row in enumerate(rows):
                for state in range(layer, len(row)):
                    writer.writerow([when or "model", layer, state, row[state]])
    plain = {
        when or "model": [[None if value != value else value for value in row] for row in rows]
        for when, rows in curves.items()
    }
    record = {"diagnosis": "stability", **provenance(), "size": size, "relative_error": plain}
    (out / "stability.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(curves, size, out / "stability.png")


def plot(curves: dict[str, list[list[float]]], size: float, path: Path) -> None:
    """One panel a model, one curve a layer at which the noise enters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(curves), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axis, (when, rows) in zip(axes, curves.items()):
        for layer, row in enumerate(rows):
            states = range(layer, len(row))
            axis.plot(
                states, [row[state] for state in states], marker="o", markersize=3, label=f"layer {layer}"
            )
        axis.set_xlabel("hidden state")
        axis.set_title(f"{when} fine-tuning" if when else "stability")
        axis.set_xticks(range(len(rows) + 1))
    axes[0].set_ylabel(f"relative error, noise of {size:.0%}")
    axes[-1].legend(title="noise enters", fontsize="small")
    figure.savefig(path, dpi=120)
