"""What the CPU kernels share: rows as NumPy arrays, bf16 as bit patterns, and threads.

The compiled code releases the GIL and the threads are Python's own: Numba's parallel regions abort when two
threads enter one at once under the workqueue layer, and do not survive a fork under GNU OpenMP. The number of
threads is torch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import intrinsic, overload
from torch import Tensor

# Below this many elements a thread costs more to wake than it saves.
ELEMENTS_PER_THREAD = 1 << 15


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call, cached on disk beside the source or in the user's cache, where one is writable."""
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:
        return numba.njit(function, nogil=True)


@intrinsic
def fma(_context, x, y, z):
    """x * y + z rounded once, in the dtype of z. Written out: whether LLVM fuses is otherwise its own choice."""

    def generate(context, builder, signature, arguments):
        values = [context.cast(builder, value, given, z) for value, given in zip(arguments, signature.args)]
        return builder.fma(*values)

    return z(x, y, z), generate


def wide(row, i):
    """Element i of a row in the dtype the sum is taken in: uint16 holds bf16."""


def store(row, i, value):
    """Write `value` to element i of a row, rounded to the row's dtype."""


@overload(wide)
def _wide_overload(row, i):
    if row.dtype == numba.uint16:
        return lambda row, i: np.uint32(np.uint32(row[i]) << np.uint32(16)).view(np.float32)
    return lambda row, i: row[i]


@overload(store)
def _store_overload(row, i, value):
    if row.dtype == numba.uint16:

        def store_bf16(row, i, value):
            bits = np.float32(value).view(np.uint32)
            even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            nan = np.uint32(value != value) * np.uint32(0x40)  # keeps a quiet bit that the shift would lose
            row[i] = np.uint16(
                np.uint32(bits + (np.uint32(0x7FFF) + even) * (value == value)) >> np.uint32(16) | nan
            )

        return store_bf16

    def store(row, i, value):
        row[i] = value

    return store


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dist-reg-rows")


# A forked child (a DataLoader worker) inherits the pool object without its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def for_rows(function: Callable[..., None], rows: int, columns: int, arguments: tuple[Any, ...]) -> None:
    """Run `function(begin, end, *arguments)` over all rows, this thread taking the first share."""
    threads = max(1, min(torch.get_num_threads(), rows, rows * columns // ELEMENTS_PER_THREAD))
    cuts = [rows * i // threads for i in range(threads + 1)]
    others = [
        _pool(torch.get_num_threads()).submit(function, begin, end, *arguments)
        for begin, end in pairwise(cuts[1:])
    ]
    function(cuts[0], cuts[1], *arguments)
    for share in others:
        share.result()


def rows_of(tensor: Tensor) -> np.ndarray:
    """A tensor [..., columns] as a contiguous array [rows, columns]; bf16 as uint16."""
    flat = tensor.detach().contiguous().view(-1, tensor.shape[-1])
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
