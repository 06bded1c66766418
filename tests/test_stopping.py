"""Stopping on request: what a process hears, and a run that goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal

import pytest
import torch
import transformers

from dist_reg import HyPe, Trainer
from dist_reg.checkpoint import newest_whole
from dist_reg.errors import Stopped
from dist_reg.stop_callback import StopCallback
from dist_reg.stopping import SIGNALS, StopRequest, current_request, listening
from tests.models import build

EXAMPLES, BATCH, EPOCHS = 12, 4, 3
STEPS = EXAMPLES // BATCH * EPOCHS


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_requests_while_listening(number):
    before = signal.getsignal(number)
    with listening() as request:
        assert current_request() is request
        assert not request.asked
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert request.asked
    assert signal.getsignal(number) == before
    assert not current_request().asked


def _survives(reached, going_on) -> None:
    reached.set()
    going_on.wait(20)


def test_a_loader_s_worker_outlives_the_signals():
    fork = multiprocessing.get_context("fork")
    reached, going_on = fork.Event(), fork.Event()
    with listening():
        worker = fork.Process(target=_survives, args=(reached, going_on), daemon=True)
        worker.start()
        assert reached.wait(20)
        for number in SIGNALS:
            os.kill(worker.pid, number)
        going_on.set()
        worker.join(20)
        assert worker.exitcode == 0


class AskAt(transformers.TrainerCallback):
    """Asks during one step, as a signal does."""

    def __init__(self, request: StopRequest, step: int | None) -> None:
        self.request, self.step = request, step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            self.request.asked = True


def rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 20, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] % 2), "example_id": i} for i, row in enumerate(ids)]


def train(folder, stop_at: int | None, **options) -> Trainer:
    """Train to the end or to the step after which the run was asked to stop; goes on from what is saved."""
    torch.manual_seed(0)
    model = build("bert", "classification", num_labels=2)
    fields = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, **options}
    args = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=1e-3, seed=3,
        logging_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, metric_for_best_model="loss",
        restore_callback_states_from_checkpoint=True, **fields,
    )  # fmt: skip
    trainer = Trainer(
        model, args, methods=[HyPe(sigma=0.05)], train_dataset=rows(EXAMPLES), eval_dataset=rows(8)
    )
    request = StopRequest()
    trainer.add_callback(AskAt(request, stop_at))
    trainer.add_callback(StopCallback(request))
    trainer.remove_callback(transformers.PrinterCallback)
    resume = newest_whole(folder)
    with pytest.raises(Stopped) if stop_at else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


OPTIONS = {
    "by epochs": {},
    "by steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "nothing saved": {"save_strategy": "no", "load_best_model_at_end": False},
    "the best saved": {"save_strategy": "best"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_stopped_at_any_step_it_ends_as_the_unbroken_run(tmp_path, name):
    options = OPTIONS[name]
    unbroken = train(tmp_path / "unbroken", None, **options)
    expected = dict(unbroken.model.state_dict())
    # Within an epoch, at its end, and at the end of the run.
    for step in range(1, STEPS + 1) if name == "by epochs" else (1, 3, 5, STEPS):
        folder = tmp_path / f"stopped-{step}"
        stopped = train(folder, step, **options)
        assert stopped.state.global_step >= step
        if name != "the best saved":
            assert stopped.state.global_step == step
        resumed = train(folder, None, **options)
        found = resumed.model.state_dict()
        assert all(found[key].equal(expected[key]) for key in expected), step
        assert evaluations(resumed) == evaluations(unbroken), step
        assert resumed.state.best_metric == unbroken.state.best_metric


def evaluations(trainer: Trainer) -> list[tuple[int, float]]:
    """Step and loss of every evaluation, also of those before a resume."""
    return [(line["step"], line["eval_loss"]) for line in trainer.state.log_history if "eval_loss" in line]
