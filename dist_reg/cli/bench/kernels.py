"""`dist-reg bench kernels`: every operation against eager torch, torch.compile and a copy, checked before it is timed."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_reg.errors import UserError, make_folder

# [batch, tokens, channels]. On CUDA a half-precision tensor holds 64 MiB, more than the second cache does.
SHAPES = {
    "cpu": [(16, 128, 384), (8, 512, 768)],
    "cuda": [(16, 2736, 768), (16, 2048, 1024), (16, 512, 4096), (8, 512, 8192)],
}
SMOKE_SHAPES = [(2, 5, 36), (1, 3, 64)]
DTYPES = ("float32", "bfloat16")


@click.command("kernels")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option(
    "--rounds", default=30, type=click.IntRange(min=2), help="Timed rounds; each runs everything once."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for kernels.csv, .json and .png.")
@click.option(
    "--smoke", is_flag=True, help="Tiny sizes, two rounds, no torch.compile: does the benchmark run?"
)
def kernels(device: str | None, rounds: int, out: Path | None, smoke: bool) -> int:
    """Time each kernel, forward and backward, after checking it against its formula; 1 when a check fails."""
    import torch

    from dist_reg.bench.measure import measure
    from dist_reg.provenance import provenance

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch finds no CUDA device here; leave the option out to measure the CPU."
        )
    if out is not None:
        make_folder(out, "--out")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rounds = 2 if smoke else rounds
    settings = [
        (shape, getattr(torch, dtype))
        for shape in (SMOKE_SHAPES if smoke else SHAPES[device])
        for dtype in DTYPES
    ]
    made_with = provenance()  # the checkout may change while this runs
    busy = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    for shape, dtype in track(settings, "measuring", console=Console(stderr=True), transient=True):
        rows += measure(shape, dtype, device, rounds, compiled=not smoke)
        torch.compiler.reset()
    show(rows, device, rounds)
    if device == "cpu" and busy > (os.cpu_count() or 1) / 2:
        click.echo(
            f"warning: a load average of {busy:.1f} on {os.cpu_count()} cores before the start; others' work is in "
            "these figures, most of all in those of eager torch and the copy, whose threads wait for each other.",
            err=True,
        )
    if out is not None:
        setting = {"device": device, "rounds": rounds, "smoke": smoke, "load_average_before": busy}
        write(rows, {"benchmark": "kernels", **made_with, "setting": setting}, out)
    refused = sorted({f"{row['operation']} {row['shape']} {row['dtype']}" for row in rows if row["refused"]})
    if refused:
        click.echo(
            f"error: not timed, because the check against the formula failed: {', '.join(refused)}", err=True
        )
    return 1 if refused else 0


def show(rows: list[dict[str, Any]], device: str, rounds: int) -> None:
    """The rows as a table, and what its columns mean."""
    table = Table(
        "operation", "pass", "shape", "dtype", "ms", "0.2 to 0.8", "GB/s", "of copy", "x eager", "x compile",
        "error", "plain error", "extra MiB", box=None, pad_edge=False,
    )  # fmt: skip
    for row in rows:
        place = [row[name] for name in ("operation", "pass", "shape", "dtype")]
        if row["refused"]:
            table.add_row(*place, "refused", row["refused"])
            continue
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}"
        table.add_row(
            *place,
            f"{row['ours_ms']:.3f}",
            f"{row['ours_ms_low']:.3f} to {row['ours_ms_high']:.3f}",
            f"{row['ours_gb_per_s']:.1f}",
            f"{row['fraction_of_copy']:.2f}",
            f"{row['times_eager']:.2f}",
            "-" if row["times_compile"] is None else f"{row['times_compile']:.2f}",
            f"{row['error']:.1e}",
            f"{row['plain_error']:.1e}",
            extra,
        )
    console = Console()
    console.print(table, highlight=False)
    memory = "" if device == "cuda" else " Extra memory is measured on CUDA only."
    console.print(
        f"{device}, {rounds} interleaved rounds. Medians; of copy: bytes that the pass must move over the bandwidth of "
        "a copy in the same run; x: how often ours fits into the other's time, median over rounds; error: largest "
        f"difference from float64 as a share of the largest value, plain torch's beside it.{memory}",
        highlight=False,
    )
    for note in sorted({row["note"] for row in rows} - {""}):
        console.print(note, highlight=False)


def write(rows: list[dict[str, Any]], record: dict[str, Any], out: Path) -> None:
    """kernels.csv, kernels.json with provenance, and kernels.png in the folder `out`."""
    with (out / "kernels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (out / "kernels.json").write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    plot(rows, out / "kernels.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """For every shape and dtype, the share of the copy bandwidth that each variant of each pass reaches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(4.5 * len(panels), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        shown = [row for row in rows if (row["shape"], row["dtype"]) == panel]
        for i, variant in enumerate(("ours", "eager", "compile")):
            shares = [
                row["bytes"] / (row[f"{variant}_ms"] * 1e6) / row["copy_gb_per_s"]
                if row[f"{variant}_ms"]
                else 0
                for row in shown
            ]
            axis.barh([place + 0.27 * i for place in range(len(shown))], shares, height=0.25, label=variant)
        axis.set_yticks(
            [place + 0.27 for place in range(len(shown))],
            [f"{row['operation']}, {row['pass']}" for row in shown],
        )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(" ".join(panel))
        axis.set_xlabel("share of the copy bandwidth")
    axes[0].invert_yaxis()
    axes[-1].legend()
    figure.savefig(path, dpi=120)
