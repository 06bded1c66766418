"""Leaves while gloo still works on the last collective; see test_leave.py.

The first exit handler, so the last to run, keeps hold of the interpreter until that collective is over: its thread
then waits for the interpreter at the moment when an ordinary exit tears it down.
"""

import atexit
import os
import time

atexit.register(sum, range(10**8))

import torch  # noqa: E402  registers exit handlers of its own

from dist_reg.runtime import leave, rank  # noqa: E402

torch.distributed.init_process_group("gloo")
held = torch.distributed.group.WORLD  # as DeepSpeed holds its groups
tensor = torch.ones(4)
if rank() == 1:
    time.sleep(1)
    torch.distributed.all_reduce(tensor)
    os._exit(0)
torch.distributed.all_reduce(tensor, async_op=True)
print("leaving")
leave()
