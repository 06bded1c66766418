"""`dist-reg bench step`: what a training step costs with each method, plain steps interleaved in the same run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dist_reg.bench.variant import Variant
from dist_reg.config import build_method, normalise, parse_yaml
from dist_reg.errors import UserError, make_folder
from dist_reg.methods import METHODS


@click.command("step")
@click.option(
    "--methods",
    default="hype",
    help="Methods to time, comma separated; each may be YAML, hype: {sigma: 1e-4}.",
)
@click.option(
    "--model",
    default="minilm",
    help="A folder, a hub name, minilm, or the shape of bert-large or llama-1b with random weights.",
)
@click.option("--batch-size", default=16, type=click.IntRange(min=1), help="Examples in a step.")
@click.option("--length", default=128, type=click.IntRange(min=1), help="Tokens in an example.")
@click.option(
    "--steps", default=30, type=click.IntRange(min=3), help="Timed rounds; each runs every variant once."
)
@click.option("--peers", is_flag=True, help="Time each method's straightforward PyTorch form as well.")
@click.option("--memory", is_flag=True, help="Measure each variant's peak memory, in a process of its own.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for step.json, with provenance.")
def step(
    methods: str,
    model: str,
    batch_size: int,
    length: int,
    steps: int,
    peers: bool,
    memory: bool,
    out: Path | None,
) -> None:
    """Time a whole training step (forward, backward, AdamW), the variants taking turns."""
    from dist_reg.bench.step import load, measure, peak_memory
    from dist_reg.provenance import provenance
    from dist_reg.run import positions

    if out is not None:
        make_folder(out, "--out")
    variants = build_variants(methods, peers)
    base = load(model)
    most = positions(base)
    if most is not None and length > most:
        raise UserError(f"--length is {length}, but the model takes at most {most} tokens.")
    rows = measure(variants, base, batch_size, length, steps)
    if memory:
        for variant, row in zip(variants, rows):
            row["peak_memory_mib"] = peak_memory(variant, model, batch_size, length)
    show(rows)
    Console().print(
        f"{model}, batch {batch_size}, length {length}, {steps} interleaved rounds; ratios are medians over rounds. A "
        "method that switches hidden dropout off is compared with plain steps without it as well. Ideal: what the "
        "method's own forwards and backwards make of the plain step.",
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


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table(
        "variant", "median ms", "quartiles ms", "vs same dropout", "vs dropout 0.1", "of ideal", "peak MiB",
        box=None, pad_edge=False,
    )  # fmt: skip
    for row in rows:
        memory = row["peak_memory_mib"]
        table.add_row(
            row["variant"],
            f"{row['median_ms']:.1f}",
            f"{row['quartile_low_ms']:.1f} to {row['quartile_high_ms']:.1f}",
            f"{row['ratio_same_dropout']:.3f}",
            f"{row['ratio_plain']:.3f}",
            f"{row['ratio_ideal']:.3f} ({row['ideal']:.2f} x)",
            "-" if memory is None else f"{memory:.0f}",
        )
    Console().print(table, highlight=False)


def build_variants(methods: str, peers: bool) -> list[Variant]:
    """Plain with and without dropout, every method of `methods`, and with `peers` their straightforward forms."""
    from dist_reg.bench.peers import OPTIONS, PEERS

    variants = [Variant("plain"), Variant("plain, no dropout", dropout=False)]
    raw = parse_yaml(f"[{methods}]", "--methods")
    if not raw:
        raise UserError("--methods: name at least one method, such as hype.")
    for entry in normalise({"methods": raw}, "--methods")["methods"]:
        for name, options in entry.items():
            label = name + (f" {options}" if options else "")
            build_method(name, options)
            for choice in dropout_choices(name, options):
                method = build_method(name, {**options, **choice})
                still = choice.get("dropout") == "off"
                variants.append(Variant(label + ", no dropout" * still, dropout=not still, method=method))
            unknown = [option for option in options if option not in OPTIONS.get(name, options)]
            if peers and unknown:
                raise UserError(
                    f"--peers: the straightforward form of {name} has no {unknown[0]}; leave it or --peers out."
                )
            if peers and name in PEERS:
                method = build_method(name, options)
                variants.append(Variant(f"{label}, straightforward", method=method, peer=True))
    return variants


def dropout_choices(name: str, options: dict[str, Any]) -> list[dict[str, str]]:
    """A method that may switch dropout off is timed both ways, each against plain with the same dropout."""
    defaults = {field.name: field.default for field in dataclasses.fields(METHODS[name])}
    if defaults.get("dropout") not in ("off", "keep"):
        return [{}]
    return (
        [{"dropout": options["dropout"]}]
        if "dropout" in options
        else [{"dropout": "off"}, {"dropout": "keep"}]
    )
