"""Times training steps of variants that take turns, and measures what each needs of memory."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from dist_reg.attach import regularize
from dist_reg.backbone import find_backbone, hidden_dropouts
from dist_reg.bench.peers import PEERS
from dist_reg.bench.variant import Variant
from dist_reg.config import ModelConfig
from dist_reg.model import load_model

WARM_UP = 2

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "bert-large": (
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "llama-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "vocab_size": 128256,
        },
    ),
}
"""Shapes of models that need no weights to be timed: family and sizes."""


def load(model: str) -> Any:
    """The model called `model` with a fresh classification head: pretrained, or random in one of `SHAPES`."""
    if model in SHAPES:
        family, sizes = SHAPES[model]
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, num_labels=2, pad_token_id=0, **sizes)
        return transformers.AutoModelForSequenceClassification.from_config(config)
    return load_model(ModelConfig(name=model), "AutoModelForSequenceClassification", seed=0, num_labels=2)[0]


def measure(
    variants: list[Variant], base: Any, batch_size: int, length: int, steps: int
) -> list[dict[str, Any]]:
    """Median and quartiles of each variant's step time in ms, its ratio to the plain variants and to its ideal."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = _batch(base, batch_size, length, device)
    steppers = {one.name: _stepper(_build(one, copy.deepcopy(base)).to(device), batch) for one in variants}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    names = list(steppers)
    for round_ in range(steps + WARM_UP):
        # Each round starts with another variant, so that none always follows the same one.
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            _settle(device)
            start = time.perf_counter()
            steppers[name]()
            _settle(device)
            if round_ >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3)
    parts = find_backbone(base)
    rows = []
    for one in variants:
        values = times[one.name]
        low, _, high = statistics.quantiles(values, n=4)
        same = _paired_ratio(values, times["plain" if one.dropout else "plain, no dropout"])
        ideal = 1.0 if one.method is None else one.method.ideal_cost(len(parts.layers), parts.hidden_size)
        rows.append(
            {
                "variant": one.name,
                "median_ms": statistics.median(values),
                "quartile_low_ms": low,
                "quartile_high_ms": high,
                "ratio_same_dropout": same,
                "ratio_plain": _paired_ratio(values, times["plain"]),
                "ideal": ideal,
                "ratio_ideal": same / ideal,
                "peak_memory_mib": None,
            }
        )
    return rows


def peak_memory(variant: Variant, model: str, batch_size: int, length: int) -> float:
    """Peak MiB of three training steps in a process of its own: resident memory, on CUDA the allocator's."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_of, (variant, model, batch_size, length))


def _peak_of(variant: Variant, model: str, batch_size: int, length: int) -> float:
    base = load(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = _batch(base, batch_size, length, device)
    step = _stepper(_build(variant, base).to(device), batch)
    for _ in range(3):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _peak_resident_kib() / 1024


def _peak_resident_kib() -> float:
    """Of this process alone: `ru_maxrss` starts from what the parent held when it was forked."""
    status = Path("/proc/self/status")
    if status.is_file():
        return float(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _build(variant: Variant, model: Any) -> Any:
    if not variant.dropout:
        dropouts: Any = hidden_dropouts(model)
        for _, module in dropouts:
            module.p = 0.0
    if variant.method is None:
        return model.train()
    if variant.peer:
        return PEERS[variant.method.name](model, variant.method).train()
    regularize(model, [variant.method], seed=0)
    return model.train()


def _batch(model: Any, batch_size: int, length: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, model.config.vocab_size, (batch_size, length), generator=generator),
        "attention_mask": torch.ones(batch_size, length, dtype=torch.long),
        "labels": torch.randint(2, (batch_size,), generator=generator),
    }
    return {name: value.to(device) for name, value in batch.items()}


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _paired_ratio(values: list[float], baseline: list[float]) -> float:
    """Median over rounds of the ratio within a round: what the machine did meanwhile cancels."""
    return statistics.median(value / base for value, base in zip(values, baseline))


def _stepper(model: Any, batch: dict[str, Any]) -> Callable[[], None]:
    gc.collect()
    handle = getattr(model, "_dist_reg_handle", None)
    groups = model.parameters() if handle is None else handle.parameter_groups(1e-5)
    optimizer = torch.optim.AdamW(groups, lr=1e-5)

    def one_step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return one_step
