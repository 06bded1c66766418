"""The same run on any topology: equal losses, step by step, against a loop written out by hand."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dist_reg import example_keys, regularize
from dist_reg.config import ModelConfig
from dist_reg.model import load_model
from tests.distributed.launch import ROOT, run
from tests.distributed.parity_worker import BATCH, EXAMPLES, METHODS, STEPS, collate, examples
from tests.tiny import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.compat]

WORKER = str(ROOT / "tests" / "distributed" / "parity_worker.py")
MVCR_CELL = {"checkpointing": False, "model": "bert", "optimizer": "adamw", "methods": "mvcr"}
"""The end of its warm-up, where Adam begins anew, is another place in every stage of ZeRO."""
HIRE_CELL = {"checkpointing": True, "model": "llama", "optimizer": "sgd", "methods": "hire"}
"""Its GRU's weights, which lie flat, are cut by ZeRO-3."""
TOLERANCE = {"sgd": 1e-5, "adamw": 5e-4}


def cells(processes: int) -> list[dict]:
    """A covering selection: every pair of values of two settings occurs together at some number of processes."""
    stages = (None, 0, 1, 2, 3)
    rotation = itertools.cycle(
        itertools.product((1, 2), (False, True), ("bert", "llama", "bert-headless"), ("sgd", "adamw"))
    )
    skip = {1: 0, 2: 5, 4: 11}[processes]
    for _ in range(skip):
        next(rotation)
    chosen = []
    for stage in stages:
        for _ in range(4 if processes < 4 else 2):
            accumulation, checkpointing, model, optimizer = next(rotation)
            for _ in range(4):
                next(rotation)
            chosen.append(
                {
                    "stage": stage,
                    "accumulation": accumulation,
                    "checkpointing": checkpointing,
                    "model": model,
                    "optimizer": optimizer,
                    "methods": "hype",
                }
            )
    return [*chosen, {**chosen[0], "methods": "plain"}, *cells_of_other_methods(processes)]


def cells_of_other_methods(processes: int) -> list[dict]:
    """Every stage at every number of processes, every other method at one of them, the other settings in rotation."""
    names = [name for name in METHODS if name not in ("plain", "hype")]
    found = []
    for index, stage in enumerate((None, 0, 1, 2, 3, 3)):
        name = names[(index + {1: 0, 2: 6, 4: 1}[processes]) % len(names)]
        found.append(
            {
                "stage": stage,
                # A pair of examples must fit into a micro-batch.
                "accumulation": 1 if "secant" in name else 1 + index % 2,
                "checkpointing": bool((index + processes) // 2 % 2),
                "model": ("bert", "llama")[(index + processes // 2) % 2],
                "optimizer": ("sgd", "adamw")[index % 2],
                "methods": name,
            }
        )
    if processes == 2:
        for cell in (MVCR_CELL, HIRE_CELL):
            found.extend(cell | {"stage": stage, "accumulation": 1 + stage % 2} for stage in range(4))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    options = {"dropout": 0.0, "seed": 3, "num_labels": 2}
    save_tiny(root / "bert", "bert", **options)
    save_tiny(root / "llama", "llama", **options)
    save_tiny(root / "bert-headless", "bert", head="base", **options)
    return root


def by_hand(folder, cell: dict) -> list[float]:
    """The losses of a plain loop: one process, whole batches, nothing of the trainer."""
    if cell["model"] == "bert-headless":
        source = ModelConfig(name=str(folder / cell["model"]))
        model, _ = load_model(source, "AutoModelForSequenceClassification", seed=11, num_labels=2)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder / cell["model"], num_labels=2)
    model.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_REG_FUSE", "never")
        handle = regularize(model, METHODS[cell["methods"]], seed=11)
    rows, losses = examples(), []
    steps_per_epoch = -(-EXAMPLES // BATCH)
    alone = steps_per_epoch * max((method.epochs_alone() for method in handle.methods), default=0)
    rate = 1e-3 if cell["optimizer"] == "adamw" else 0.1
    multiples = handle.learning_rate_multiples()
    own = optimizer_of([(n, p) for n, p in model.named_parameters() if p not in multiples], cell)
    # Apart from the model's: it steps through the warm-up, the other one then begins as a new one does.
    added = optimizer_of([(n, p) for n, p in model.named_parameters() if p in multiples], cell)
    warmup = STEPS // 10
    for step in range(STEPS + alone):
        epoch, position = divmod(step, steps_per_epoch)
        order = torch.randperm(
            EXAMPLES, generator=torch.Generator().manual_seed(11 * 1_000_003 + epoch)
        ).tolist()
        order = (order + order)[position * BATCH : (position + 1) * BATCH]
        batch = collate([rows[index] for index in order])
        ids = batch.pop("example_ids")
        batch["example_keys"] = example_keys(ids, epoch)
        handle.warming_up = step < alone
        joint = step - alone
        scale = joint / warmup if joint < warmup else (STEPS - joint) / (STEPS - warmup)
        for group in own.param_groups:
            group["lr"] = rate * scale
        for group in added.param_groups:
            group["lr"] = rate * (1.0 if step < alone else scale) * next(iter(multiples.values()), 1.0)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        added.step()
        if step >= alone:
            own.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(named: list, cell: dict) -> torch.optim.Optimizer:
    """Weight decay on what is neither a bias nor of a norm."""
    free = [p for n, p in named if "bias" in n or "norm" in n.lower()]
    decayed = [p for n, p in named if not ("bias" in n or "norm" in n.lower())]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": free, "weight_decay": 0.0}]
    return (torch.optim.AdamW if cell["optimizer"] == "adamw" else torch.optim.SGD)(groups, lr=0.0)


@pytest.fixture(scope="module")
def expected(folder):
    known: dict[tuple, list[float]] = {}

    def of(cell: dict) -> list[float]:
        key = (cell["model"], cell["optimizer"], cell["methods"])
        if key not in known:
            known[key] = by_hand(folder, cell)
        return known[key]

    return of


@pytest.mark.parametrize(("processes", "fuse"), [(1, "auto"), (2, "auto"), (2, "always"), (4, "auto")])
def test_logged_losses_equal_the_hand_made_loop_in_every_cell(folder, expected, tmp_path, processes, fuse):
    chosen = cells(processes)
    if fuse == "always":
        chosen = [cell for cell in chosen if cell["methods"] == "hype"]
    (tmp_path / "cells.json").write_text(json.dumps(chosen))
    out = tmp_path / "out.json"
    done = run([WORKER, str(folder), str(tmp_path / "cells.json"), str(out)], processes, DIST_REG_FUSE=fuse)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert result["world_size"] == processes
    if fuse == "always":
        assert [count > 0 for count in result["fused"]] == [fusible(cell) for cell in chosen]
    wrong = []
    for cell, losses in zip(chosen, result["losses"], strict=True):
        reference = torch.tensor(expected(cell))
        assert len(losses) == len(reference)
        error = ((torch.tensor(losses) - reference).abs() / reference.abs()).max().item()
        if not error <= TOLERANCE[cell["optimizer"]]:
            wrong.append(
                f"{cell}: relative error {error:.2e}, first losses {losses[:2]} against {reference[:2]}"
            )
    assert not wrong, "\n".join(wrong)


def fusible(cell: dict) -> bool:
    """Whether a norm can add the noise: BERT's everywhere, Llama's where its weight is at hand and nothing reruns."""
    alone = cell["model"] == "llama" and (cell["stage"] == 3 or cell["checkpointing"])
    return not alone


@pytest.mark.parametrize("methods", [name for name in METHODS if name != "plain"])
def test_the_method_is_in_the_reference(expected, methods):
    """The comparison would mean little if a method did not move the loss."""
    cell = {"model": "bert", "optimizer": "sgd"}
    found = torch.tensor(expected({**cell, "methods": methods}))[-STEPS:]
    without = torch.tensor(expected({**cell, "methods": "plain"}))
    assert ((found - without).abs() / without).max() > 1e-3
