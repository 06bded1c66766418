"""What a process needs before torch.distributed and DeepSpeed start, and what it must leave behind: nothing."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import warnings
from typing import NoReturn


def rank() -> int:
    """Rank of this process over all nodes, from the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes over all nodes, from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def prepare_process(deepspeed: bool) -> None:
    """Set this process up for training, before the first TrainingArguments.

    Without a CUDA device DeepSpeed is told to use the CPU. Its shared-memory all-reduce is switched off: only its
    inference path calls that operator, yet every start would compile it for most of a minute, hang on the lock of
    a killed compilation, and leave 69 MB a rank in /dev/shm.
    """
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed's own calls, thousands of times a run.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if deepspeed:
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed.ops
            from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
            from deepspeed.utils import logger
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        logger.setLevel(logging.WARNING)
        # A launch without torchrun is a world of one; DeepSpeed would otherwise look for MPI.
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }.items():
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(free_port())


def keep_freed_memory() -> None:
    """On a CPU, let the allocator reuse what a step freed instead of asking the kernel for fresh pages; call it
    before torch is imported.

    Gradients and ZeRO's buffers are larger than glibc's mmap threshold, so each step would fault them in anew:
    MiniLM under ZeRO-2 on two processes took 0.65 s a step without and 0.42 s with these settings.
    """
    if os.path.exists("/dev/nvidiactl") or sys.platform != "linux":
        return
    # Torch asks for huge pages; read at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import ctypes

    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(top_pad, 1 << 28)


def die_with_launcher() -> None:
    """Under torchrun, end when it ends: its workers live in sessions of their own and would outlive its SIGKILL."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)


def stop_tree(pid: int, patience: float = 10.0) -> None:
    """End process `pid` and all its descendants: SIGTERM, then SIGKILL for what is left after `patience` seconds."""
    import psutil

    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for action in ("terminate", "kill"):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()
        _, family = psutil.wait_procs(family, timeout=patience)


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def leave(code: int = 0) -> NoReturn:
    """End this process with exit code `code`, its process group first; the last thing a program does.

    After a process group the exit handlers run and the interpreter's teardown is skipped. A thread of gloo may still
    be releasing the tensors of the last collective; up to Python 3.13 a teardown unwinds a thread that waits for the
    interpreter, and in the middle of a C++ destructor that aborts the process.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        sys.exit(code)
    if code == 0:
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
