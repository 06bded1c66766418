"""Shared by all tests: no network, and nothing left behind in shared memory."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DIST_REG_CACHE", "off")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated: any test file may be the first that imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def shared_memory_left_clean():
    """No test may leave a DeepSpeed buffer in shared memory."""
    folder = Path("/dev/shm")
    before = set(folder.glob("deepspeed_*")) if folder.is_dir() else set()
    yield
    left = (set(folder.glob("deepspeed_*")) if folder.is_dir() else set()) - before
    assert not left, f"left in shared memory: {sorted(str(path) for path in left)}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
