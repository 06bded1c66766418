"""What can be wrong with a run before it waits in a queue, found without importing torch."""

from __future__ import annotations

from typing import Any

from dist_reg.batch import cut_batch
from dist_reg.config import RunConfig, training_fields
from dist_reg.ds_config import check_agreement, check_optimizer, read_ds_config
from dist_reg.errors import UserError, nearest
from dist_reg.launch.job import Job
from dist_reg.rundir import RunDirectory

RENAMED_ON_LOAD = ("gradient_checkpointing", "activation_checkpointing")
"""The two names of one field, of which the installed Transformers knows one; each may end in `_kwargs`."""


def check_run(run: RunConfig, job: Job) -> None:
    """Raise UserError where `run`, whose methods are checked, does not fit itself, its folder or the job."""
    known = training_fields()
    for key in run.train:
        if known and key not in known and key.removesuffix("_kwargs") not in RENAMED_ON_LOAD:
            raise UserError(f"train: unknown key {key!r}; {nearest(key, known)}")
    train: dict[str, Any] = {**run.train, **cut_batch(run.batch_size, job.processes, run.train)}
    if run.deepspeed is not None:
        config = read_ds_config(run.deepspeed, import_deepspeed=False)
        check_optimizer(train.get("optim", "adamw_torch"), config)
        check_agreement(run, train, config)
    RunDirectory(run.output_dir).check(run)
