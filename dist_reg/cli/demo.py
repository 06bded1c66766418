"""`dist-reg demo`: plain fine-tuning with and without dropout against HyPe, on two processes, in minutes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dist_reg.config import write_yaml
from dist_reg.errors import UserError, make_folder
from dist_reg.rundir import RESULTS
from dist_reg.runtime import stop_tree

BATCH = 32
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-no-dropout": {"model": {"name": "minilm", "config": {"hidden_dropout_prob": 0.0}}},
    "hype": {"methods": [{"hype": {"sigma": 1e-2}}]},
}


@click.command("demo")
@click.option(
    "--out", default="runs/demo", type=click.Path(path_type=Path), help="Folder for the three runs."
)
@click.option("--processes", default=2, type=click.IntRange(min=1), help="Processes of each run.")
def command(out: Path, processes: int) -> None:
    """Compare HyPe with plain fine-tuning on a small English task, with DeepSpeed ZeRO-2, in minutes.

    Runs that are finished already are not trained again.
    """
    from dist_reg.cli.report import show

    if BATCH % processes:
        raise UserError(f"--processes must divide the batch of {BATCH} examples; it is {processes}.")
    console = Console()
    make_folder(out, "--out")
    start, trained = time.perf_counter(), 0
    for name, changes in VARIANTS.items():
        run_file = out / f"{name}.yaml"
        write_yaml(run(out / name, changes), run_file)
        console.print(f"[bold]{name}[/]", highlight=False)
        if (out / name / RESULTS).is_file():
            console.print(f"  finished earlier; remove {out / name} to train it again", highlight=False)
            continue
        launch(run_file, processes)
        trained += 1
    minutes = (time.perf_counter() - start) / 60
    console.print(
        f"\nthree runs in {minutes:.1f} minutes\n" if trained == len(VARIANTS) else "", highlight=False
    )
    show(out)
    command = "dist-reg" if shutil.which("dist-reg") else os.path.relpath(sys.argv[0])
    console.print(
        "\nOne seed says little. Next:\n"
        f"  {command} train {out / 'hype.yaml'} train.seed=1 train.output_dir={out / 'hype-seed1'}\n"
        f"  {command} train RUN.yaml          your own data: see examples/ and the README\n"
        f"  {command} methods                 what else there is\n"
        f"  {command} doctor                  what this machine can do",
        highlight=False,
        soft_wrap=True,
    )


def run(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The run file of one variant: the same model, data, budget and seed for all three."""
    return {
        "model": "minilm",
        "task": "demo",
        "data": {"max_length": 64},
        "methods": [],
        "batch_size": BATCH,
        "train": {
            "learning_rate": 2e-4,
            "num_train_epochs": 4,
            "seed": 0,
            "output_dir": str(folder),
            "save_strategy": "no",
        },
        "deepspeed": "zero2",
        **changes,
    }


def launch(run_file: Path, processes: int) -> None:
    """`torchrun ... -m dist_reg train RUN_FILE` to its end; nothing of it outlives this call."""
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments += ["-m", "dist_reg", "train", str(run_file)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    # The child is in a session of its own: what ends this process must end it too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    child = subprocess.Popen([sys.executable, *arguments], env=environment, start_new_session=True)
    try:
        code = child.wait()
    finally:
        stop_tree(child.pid)
    if code:
        raise UserError(f"the run {run_file} failed with exit code {code}; its messages are above.")
