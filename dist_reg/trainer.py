"""Transformers' Trainer with methods attached, noise keyed by example, and checkpoints that are whole or absent."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers.trainer_utils import rotate_checkpoints

from dist_reg import checkpoint
from dist_reg.attach import regularize
from dist_reg.backbone import EXTRA
from dist_reg.errors import UserError, reason
from dist_reg.forward import inner_model
from dist_reg.kept import ADDED_FILE, added_tensors
from dist_reg.methods.base import Method
from dist_reg.noise import example_keys
from dist_reg.optimizer import MULTIPLE, after_warm_up, split_groups, start_anew
from dist_reg.streams import IGNORED
from dist_reg.terms import NonFiniteTerm

logger = logging.getLogger(__name__)

ID_COLUMN = "example_id"
ID_BATCH = "example_ids"
SPANS = "row_spans"
"""Of rows that hold several examples, see `dist_reg.tasks.packing`."""
GROUPED = 50
"""Optimizer steps whose examples are sorted by length among themselves, as Transformers' own grouping does."""
SAMPLING_STRATEGIES = ("random", "sequential")
"""Orders of examples that `EpochSampler` makes; the others depend on the topology."""


class EpochSampler(Sampler[int]):
    """A new order of all examples every epoch, a function of (seed, epoch) alone, filled up to whole global batches.

    Consecutive `batch_size` indices are one optimizer step, however many processes and micro-batches share it: the
    loader deals them out in turn. The last batch of an epoch is completed from the epoch's own beginning, so every
    step weighs the same at every topology. With `lengths`, the examples of a step are about as long as each other: those of
    `GROUPED` steps are sorted among themselves, and the steps come in any order.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.examples = examples
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.examples // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) & (2**63 - 1))
        order = (
            torch.randperm(self.examples, generator=generator)
            if self.shuffle
            else torch.arange(self.examples)
        )
        filled = order.repeat(-(-len(self) // self.examples))[: len(self)]
        if self.lengths is not None:
            filled = self._grouped(filled, generator)
        return iter(filled.tolist())

    def _grouped(self, order: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        lengths = torch.tensor(self.lengths)[order]
        parts = [
            part[own.argsort(stable=True)]
            for part, own in zip(
                order.split(GROUPED * self.batch_size), lengths.split(GROUPED * self.batch_size)
            )
        ]
        steps = torch.cat(parts).view(-1, self.batch_size)
        return steps[torch.randperm(len(steps), generator=generator)].flatten()


def _pop_ids(inputs: dict[str, Any]) -> Any:
    """Take the example ids out of a batch: ours under ID_BATCH, a default collator's under the column's name."""
    found = [inputs.pop(name) for name in (ID_BATCH, ID_COLUMN) if name in inputs]
    return found[0] if found else None


def _labels_each_token(labels: Any) -> bool:
    return isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()


class _EpochCallback(transformers.TrainerCallback):
    """Tells the sampler, and through it the noise, which epoch begins, and ends the warm-up of added modules."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.begin_epoch(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if 0 < self.trainer.warmup_steps == state.global_step:
            start_anew(self.trainer.optimizer)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step <= self.trainer.warmup_steps:
            control.should_evaluate = False  # evaluation does not see the added modules

    on_epoch_end = on_step_end


class Trainer(transformers.Trainer):
    """`transformers.Trainer` that attaches `methods` (see `dist_reg.regularize`).

    The noise of an example is keyed by (`args.seed`, epoch, example id), so a run is the same on any number of
    processes and any ZeRO stage; ids come from the batch's `example_ids` (see `dist_reg.tasks.Collator`). Every log
    line holds the loss by term. Checkpoints are sealed by `dist_reg.checkpoint`. `lengths`, of the training examples, groups
    those of about one length in a step. `try_out` is called once, before the first step, with the model as it is trained, the
    Hugging Face model in it, and its device.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        args: transformers.TrainingArguments,
        *,
        methods: Sequence[Method] = (),
        layers_path: str | None = None,
        lengths: Sequence[int] | None = None,
        try_out: Callable[[Any, Any, torch.device], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self._lengths, self._try_out = lengths, try_out
        self.handle = regularize(model, methods, seed=args.seed, layers_path=layers_path)
        self._warmup_epochs = max((method.epochs_alone() for method in methods), default=0)
        if self._warmup_epochs:
            args = copy.copy(args)  # the caller's are the caller's
            args.num_train_epochs += self._warmup_epochs
        self._sampler: EpochSampler | None = None
        self._partial: Path | None = None
        self._ids_missed = False
        self._labels_of_step: Any = None
        self.evaluated_rows: Any = None
        """The rows that are being evaluated, with all their columns, for `compute_metrics`."""
        try:
            super().__init__(model=model, args=args, **kwargs)
            self._check_optimizer_of_added_modules()
            if self.args.max_steps > 0:
                self.args.max_steps += self.warmup_steps
        except BaseException:
            self.handle.remove()
            raise
        self.add_callback(_EpochCallback(self))

    # -- data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *(name for name in (ID_COLUMN, ID_BATCH) if name not in columns)]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if not hasattr(dataset, "__len__") or strategy not in SAMPLING_STRATEGIES:
            logger.warning(
                "the order of examples is not this trainer's, so it may depend on the number of processes; a data set "
                "with a length and train_sampling_strategy %s have one that does not.",
                " or ".join(SAMPLING_STRATEGIES),
            )
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(
            len(dataset), self._global_batch, seed, shuffle=strategy == "random", lengths=self._lengths
        )
        return self._sampler

    @property
    def _global_batch(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def begin_epoch(self, global_step: int) -> None:
        """Set the sampler to the epoch that begins after `global_step` optimizer steps."""
        if self._sampler is not None:
            self._sampler.set_epoch(global_step // (len(self._sampler) // self._global_batch))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run resumed from its last checkpoint, or from one where early stopping had decided, takes no further step.
        if self.state.global_step >= self.state.max_steps or self._stopped_early():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _stopped_early(self) -> bool:
        stops = [
            c for c in self.callback_handler.callbacks if isinstance(c, transformers.EarlyStoppingCallback)
        ]
        return any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops)

    # -- added modules

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps before the run's own in which the modules of a method alone learn."""
        if not self._warmup_epochs or self.train_dataset is None or self.handle.removed:
            return 0
        examples: Any = self.train_dataset
        if not hasattr(examples, "__len__"):
            raise UserError("warmup_epochs needs a training set with a length; set warmup_epochs: 0.")
        return self._warmup_epochs * -(-len(examples) // self._global_batch)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            split_groups(optimizer, self.handle.learning_rate_multiples())
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        fresh = self.lr_scheduler is None
        chosen: Any = optimizer or self.optimizer
        groups = chosen.param_groups
        if self.handle.learning_rate_multiples() and not any(MULTIPLE in group for group in groups):
            raise UserError(
                f"{type(self).__name__}.create_optimizer knows nothing of the modules that a method adds; let it call "
                "super().create_optimizer()."
            )
        scheduler: Any = super().create_scheduler(num_training_steps - self.warmup_steps, optimizer)
        if fresh and self.warmup_steps:
            scheduler = after_warm_up(scheduler, scheduler.optimizer, self.warmup_steps)
        self.lr_scheduler = scheduler
        return scheduler

    def _check_optimizer_of_added_modules(self) -> None:
        """They may learn at rates of their own, of which an optimizer from elsewhere knows nothing."""
        if not self.handle.learning_rate_multiples():
            self._check_optimizer_holds_added_modules()
            return
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise UserError(
                "optimizers: a method adds modules that learn at a rate of their own, for which the trainer must make "
                "optimizer and schedule itself; leave it out."
            )
        deepspeed: Any = (
            getattr(self.args, "hf_deepspeed_config", None) if self.is_deepspeed_enabled else None
        )
        config = {} if deepspeed is None else deepspeed.config
        for section in ("optimizer", "scheduler"):
            if section in config:
                raise UserError(
                    f"deepspeed: a method adds modules that learn at a rate of their own, which the {section} section knows "
                    "nothing of; leave the section out and say it in train."
                )
        if self.warmup_steps:
            probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            options: Any = self.args.lr_scheduler_kwargs
            schedule = transformers.get_scheduler(self.args.lr_scheduler_type, probe, 1, 10, options)
            after_warm_up(schedule, probe, 1)

    def _check_optimizer_holds_added_modules(self) -> None:
        groups = self.optimizer.param_groups if self.optimizer is not None else ()
        held = {parameter for group in groups for parameter in group["params"]}
        for name, parameter in self.handle.model.named_parameters():
            if groups and EXTRA in name and parameter.requires_grad and parameter not in held:
                raise UserError(
                    f"optimizers: the optimizer does not hold {name}, which a method added; let the trainer make it."
                )

    # -- loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._labels_of_step = None
        if samples and not self.model_accepts_loss_kwargs and _labels_each_token(samples[0].get("labels")):
            counts = torch.stack([(batch["labels"] != IGNORED).sum() for batch in samples])
            own = counts.float().mean().to(self.args.device)
            self._labels_of_step = self.accelerator.reduce(own, "mean")  # of a micro-batch
        return samples, items

    def _share_of_labels(self, labels: Any) -> torch.Tensor | None:
        """How many labelled tokens a micro-batch has, over their mean in the step's micro-batches on all processes.

        A model's loss is the mean over its own; times this, their mean is that over the labelled tokens of the whole step,
        however it is cut.
        """
        if self._labels_of_step is None or not _labels_each_token(labels):
            return None
        return (labels != IGNORED).sum() / self._labels_of_step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = _pop_ids(inputs)
        if model.training and self._try_out is not None:
            own, self._try_out = self._try_out, None
            own(model, self.handle.model, self.args.device)
        if model.training and ids is not None:
            epoch = self._sampler.epoch if self._sampler is not None else int(self.state.epoch or 0)
            inputs["example_keys"] = example_keys(ids, epoch)
        elif model.training and self.handle.methods and not self._ids_missed:
            self._ids_missed = True
            logger.warning(
                "the batches hold no %s, so noise follows torch's generator and not the example: the run depends on "
                "the number of processes; give the data set a column %s of integers.",
                ID_BATCH,
                ID_COLUMN,
            )
        spans = inputs.pop(SPANS, None)
        if spans is not None:  # Transformers tells packed examples apart only where it keeps no cache
            inputs["use_cache"] = False
            if model.training:
                inputs[SPANS] = spans
        self.handle.task_weight = self._share_of_labels(inputs.get("labels")) if model.training else None
        step, every = self.state.global_step, max(1, int(self.state.logging_steps or 1))
        self.handle.measure = step == 0 or (step + 1) % every == 0
        self.handle.optimizer_step, self.handle.warming_up = step, step < self.warmup_steps
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        except NonFiniteTerm as error:
            if ids is None:
                raise
            examples = [int(ids[row]) for row in error.rows]
            raise NonFiniteTerm(error.name, error.layer, examples, "examples with the ids") from None

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        getattr(
            self, "_eval_dataloaders", {}
        ).clear()  # Transformers keeps one for every set, whichever it was
        own: Any = self.eval_dataset
        named = isinstance(eval_dataset, str)
        self.evaluated_rows = own[eval_dataset] if named else own if eval_dataset is None else eval_dataset
        return super().evaluate(eval_dataset, *args, **kwargs)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        _pop_ids(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._metrics_of_all_ranks())
        super().log(logs, start_time)

    def _metrics_of_all_ranks(self) -> dict[str, float]:
        metrics = self.handle.metrics()
        if self.args.world_size > 1 and metrics:
            values = torch.tensor([metrics[name] for name in sorted(metrics)], device=self.args.device)
            metrics = dict(zip(sorted(metrics), self.accelerator.reduce(values, "mean").tolist()))
        return metrics

    # -- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        partial, final = root / checkpoint.PARTIAL / name, root / name
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        best_before = self.state.best_model_checkpoint
        self._partial = root / checkpoint.PARTIAL
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = self._best_path(root, best_before)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(partial / "trainer_state.json"))
                checkpoint.publish(partial, final, self.args.world_size)
        except Exception as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            kept = checkpoint.newest_whole(root)
            raise UserError(
                f"checkpoint {final} could not be written ({reason(error)}); "
                + (f"{kept} is the last whole one." if kept else "there is no earlier one.")
            ) from error
        finally:
            self._partial = None
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.remove_broken(root)
            rotate_checkpoints(
                output_dir=str(root),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # PEFT saves its adapters alone; everything else is in the model's own weights, or DeepSpeed's.
        if self._partial is not None and self._adapters_leave_modules_out():
            save_file(
                added_tensors(self.handle.model), Path(output_dir or str(self.args.output_dir)) / ADDED_FILE
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_added(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint:
            self._load_added(self.state.best_model_checkpoint)

    def _load_added(self, folder: str) -> None:
        """Load what a checkpoint of adapters keeps beside them."""
        if not self._adapters_leave_modules_out():
            return
        path = Path(folder) / ADDED_FILE
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {ADDED_FILE}, so a method's modules would begin anew; start another run."
            )
        inner_model(self.handle.model).load_state_dict(load_file(path), strict=False)

    def _adapters_leave_modules_out(self) -> bool:
        """Whether methods added something that neither the checkpoint's adapters nor DeepSpeed's files hold."""
        own: Any = self.handle.model
        return hasattr(own, "peft_config") and not self.is_deepspeed_enabled and bool(added_tensors(own))

    def _best_path(self, root: Path, before: str | None) -> str | None:
        best = root / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir() or self.state.best_global_step == self.state.global_step:
            return str(best)
        return before
