"""All ranks of a run that was asked to stop save after the same step, since what each was asked is all-reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers

from dist_reg.errors import Stopped
from dist_reg.stopping import StopRequest


class StopCallback(transformers.TrainerCallback):
    """Saves and raises Stopped after the first step at which any rank was asked to; goes last among the callbacks.

    What a rank was asked is reduced behind the following step, so nobody waits for it: a run stops one step after the
    request. Where an epoch or the run ends at that step, the evaluation that belongs there comes first.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._reduced: Callable[[], bool] | None = None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self._agreed(args.device):
            return
        epoch_ends = abs(state.epoch - round(state.epoch)) < 1e-9
        if not control.should_training_stop and not epoch_ends:
            control.should_save = control.should_log = True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.request.agreed:
            control.should_save = control.should_log = True

    def on_save(self, args, state, control, **kwargs) -> None:
        if not self.request.agreed:
            return
        if dist.is_initialized():
            dist.barrier()  # the first rank that leaves makes torchrun end the others
        raise Stopped(state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._reduced is not None:
            self._reduced()

    def _agreed(self, device: torch.device) -> bool:
        """Whether any rank had been asked by the end of the step before."""
        if self.request.agreed:
            return True
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self.request.agreed = self.request.asked
            return self.request.agreed
        if self._reduced is not None:
            self.request.agreed = self._reduced()
        self._reduced = any_rank(self.request.asked, device)
        return self.request.agreed


def any_rank(asked: bool, device: torch.device) -> Callable[[], bool]:
    """Begin to reduce `asked` over all ranks; the function returned waits for that and says whether any rank was.

    On a GPU it waits for what was queued before this call only, not for the step that is queued after it.
    """
    flag = torch.tensor([int(asked)], dtype=torch.int32).to(device, non_blocking=True)
    work: Any = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
    if device.type != "cuda":

        def result() -> bool:
            work.wait()
            return bool(flag.item())

        return result
    work.wait()  # the stream waits, this thread does not
    copy = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def result_of_device() -> bool:
        done.synchronize()
        return bool(copy.item())

    return result_of_device
