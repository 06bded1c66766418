"""How far a run is: `progress.json` in the run directory, written at every log line for `dist-reg status`."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import transformers

from dist_reg.rundir import PROGRESS


class ProgressCallback(transformers.TrainerCallback):
    """Writes step, loss and throughput of this start of the run. A file that cannot be written stops nothing."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PROGRESS
        self._loss: float | None = None
        self._first: tuple[int, float] | None = None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._first is None:  # the first step compiles and warms up
            self._first = (state.global_step, time.monotonic())

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self._loss = logs.get("loss", self._loss)
        progress: dict[str, Any] = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": state.epoch,
            "loss": self._loss,
            "seconds_per_step": None,
            "examples_per_second": None,
            "processes": args.world_size,
            "time": time.time(),
        }
        first_step, since = self._first or (state.global_step, time.monotonic())
        if state.global_step > first_step:
            seconds = (time.monotonic() - since) / (state.global_step - first_step)
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            progress |= {"seconds_per_step": seconds, "examples_per_second": batch / seconds}
        partial = self.path.with_name(f".{PROGRESS}")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(progress) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
