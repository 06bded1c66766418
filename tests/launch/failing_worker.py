"""Fails on rank 1 in the way named on the command line, while rank 0 waits for it; see test_agent.py."""

import sys
import time

import torch

from dist_reg.launch import failure
from dist_reg.runtime import leave, rank

torch.distributed.init_process_group("gloo")
try:
    torch.distributed.barrier()
    if rank() == 1:
        if sys.argv[1] == "raise":
            raise ZeroDivisionError("the cause")
        if sys.argv[1] == "exit":
            leave(9)
    if sys.argv[1] == "raise-and-hang":
        if rank() == 1:
            raise ZeroDivisionError("the cause")
        time.sleep(600)  # as in a collective that never notices
    torch.distributed.all_reduce(torch.ones(1))
except Exception as error:
    failure.record(error)
    leave(1)
