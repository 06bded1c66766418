"""`dist-reg bench step`: what a training step costs with each method, plain steps interleaved in the same run."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dist_reg.config import ModelConfig, build_method, normalise, parse_yaml
from dist_reg.errors import UserError, make_folder
from dist_reg.methods import METHODS


@click.command("step")
@click.option(
    "--methods",
    default="hype",
    help="Methods to time, comma separated; each may be YAML, hype: {sigma: 1e-4}.",
)
@click.option("--model", default="minilm", help="A folder, a hub name, or minilm.")
@click.option("--batch-size", default=16, type=click.IntRange(min=1), help="Examples in a step.")
@click.option("--length", default=128, type=click.IntRange(min=1), help="Tokens in an example.")
@click.option(
    "--steps", default=30, type=click.IntRange(min=3), help="Timed rounds; each runs every variant once."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for step.json, with provenance.")
def step(methods: str, model: str, batch_size: int, length: int, steps: int, out: Path | None) -> None:
    """Time a whole training step (forward, backward, AdamW), the variants taking turns."""
    from dist_reg.provenance import provenance
    from dist_reg.run import check_length

    if out is not None:
        make_folder(out, "--out")
    variants = build_variants(methods, model)
    check_length(variants["plain"][1], length, "--length")
    rows = measure(variants, batch_size, length, steps)
    table = Table(
        "variant", "median ms", "quartiles ms", "vs same dropout", "vs dropout 0.1", box=None, pad_edge=False
    )
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['median_ms']:.1f}",
            f"{row['quartile_low_ms']:.1f} to {row['quartile_high_ms']:.1f}",
            f"{row['ratio_same_dropout']:.3f}",
            f"{row['ratio_plain']:.3f}",
        )
    console = Console()
    console.print(table, highlight=False)
    console.print(
        f"{model}, batch {batch_size}, length {length}, {steps} interleaved rounds; ratios are medians over rounds. A "
        "method that switches hidden dropout off is compared with plain steps without it as well.",
        highlight=False,
    )
    if out is not None:
        setting = {
            "model": model,
            "batch_size": batch_size,
            "length": length,
            "steps": steps,
            "dtype": "float32",
        }
        record = {"benchmark": "step", **provenance(), "setting": setting, "rows": rows}
        (out / "step.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def build_variants(methods: str, model: str) -> dict[str, tuple[str, Any]]:
    """Variant name to (name of the plain variant with the same dropout, model ready to train)."""
    from dist_reg.attach import regularize
    from dist_reg.backbone import hidden_dropouts
    from dist_reg.model import load_model

    base, _ = load_model(ModelConfig(name=model), "AutoModelForSequenceClassification", seed=0, num_labels=2)
    still = copy.deepcopy(base)
    dropouts: Any = hidden_dropouts(still)
    for _, module in dropouts:
        module.p = 0.0
    variants: dict[str, tuple[str, Any]] = {
        "plain": ("plain", base),
        "plain, no dropout": ("plain, no dropout", still),
    }
    raw = parse_yaml(f"[{methods}]", "--methods")
    for entry in normalise({"methods": raw}, "--methods")["methods"]:
        for name, options in entry.items():
            label = name + (f" {options}" if options else "")
            build_method(name, options)
            for choice in dropout_choices(name, options):
                model_copy = copy.deepcopy(base)
                regularize(model_copy, [build_method(name, {**options, **choice})], seed=0)
                if choice.get("dropout") == "off":
                    variants[f"{label}, no dropout"] = ("plain, no dropout", model_copy)
                else:
                    variants[label] = ("plain", model_copy)
    if not raw:
        raise UserError("--methods: name at least one method, such as hype.")
    return variants


def dropout_choices(name: str, options: dict[str, Any]) -> list[dict[str, str]]:
    """A method that may switch dropout off is timed both ways, each against plain with the same dropout."""
    fields = {field.name for field in dataclasses.fields(METHODS[name])} if name in METHODS else set()
    if "dropout" not in fields:
        return [{}]
    return (
        [{"dropout": options["dropout"]}]
        if "dropout" in options
        else [{"dropout": "off"}, {"dropout": "keep"}]
    )


def measure(
    variants: dict[str, tuple[str, Any]], batch_size: int, length: int, steps: int
) -> list[dict[str, Any]]:
    """Median and quartiles of each variant's step time, and its ratio to the plain variants."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    vocabulary = next(iter(variants.values()))[1].config.vocab_size
    batch = {
        "input_ids": torch.randint(5, vocabulary, (batch_size, length), generator=generator),
        "attention_mask": torch.ones(batch_size, length, dtype=torch.long),
        "labels": torch.randint(2, (batch_size,), generator=generator),
    }
    batch = {name: value.to(device) for name, value in batch.items()}
    steppers = {name: _stepper(model.to(device).train(), batch) for name, (_, model) in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(steppers)
    for round_ in range(steps + 2):
        # Each round starts with another variant, so that none always follows the same one.
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            steppers[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    rows = []
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        rows.append(
            {
                "variant": name,
                "median_ms": statistics.median(values),
                "quartile_low_ms": low,
                "quartile_high_ms": high,
                "ratio_same_dropout": _paired_ratio(values, times[variants[name][0]]),
                "ratio_plain": _paired_ratio(values, times["plain"]),
            }
        )
    return rows


def _paired_ratio(values: list[float], baseline: list[float]) -> float:
    """Median over rounds of the ratio within a round: what the machine did meanwhile cancels."""
    return statistics.median(value / base for value, base in zip(values, baseline))


def _stepper(model: Any, batch: dict[str, Any]) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def one_step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return one_step
