"""What the CPU paths share: rows of a tensor as NumPy arrays, split over torch's number of threads.

The compiled code releases the GIL and the threads are Python's own: Numba's parallel regions abort when two
threads enter one at once under the workqueue layer, and do not survive a fork under GNU OpenMP. Every row is computed
by itself and in one order, so a result does not depend on the number of threads. bf16 is read and rounded (to nearest
even) as bit patterns inside the loops.

A number of Numba's int64 makes a float32 a float64, and a loop that holds one a quarter as fast: what enters a loop is of
the rows' own dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import intrinsic, overload
from torch import Tensor

# Below this many elements of noise, about 0.1 ms, a thread costs more to wake than it saves.
ELEMENTS_PER_THREAD = 1 << 17
PIECES = 4  # a thread

NO_SPANS = np.empty((0, 2), np.int32)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call, cached on disk beside the source or in the user's cache, where one is writable."""
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:
        return numba.njit(function, nogil=True)


@intrinsic
def sqrt(_context, x):
    """LLVM's own square root: the C library's may set errno, which forbids vector code."""

    def generate(_target, builder, _signature, arguments):
        function = builder.module.declare_intrinsic("llvm.sqrt", [arguments[0].type])
        return builder.call(function, arguments)

    return x(x), generate


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
def wide_overload(row, i):
    if row.dtype == numba.uint16:
        return lambda row, i: np.uint32(np.uint32(row[i]) << np.uint32(16)).view(np.float32)
    return lambda row, i: row[i]


@overload(store)
def store_overload(row, i, value):
    if row.dtype == numba.uint16:

        def store_bf16(row, i, value):
            bits = np.float32(value).view(np.uint32)
            even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + even)
            nan = np.uint32(bits | np.uint32(0x400000))  # keeps a quiet bit that the shift would lose
            row[i] = np.uint16(np.uint32((rounded if value == value else nan) >> np.uint32(16)))

        return store_bf16

    def store(row, i, value):
        row[i] = value

    return store


@numba.njit(fastmath={"reassoc"})
def root_mean_square(row, zero):
    total = zero
    for i in range(row.size):
        x = wide(row, i)
        total += x * x
    return sqrt(total / (zero + row.size))


@numba.njit(forceinline=True)
def place(row, tokens):
    """(example, token) of row number `row` of a batch. In 32 bits: a 64-bit division is as slow as 25 channels."""
    example = np.int64(np.uint32(row) // np.uint32(tokens))
    return example, row - example * tokens


@numba.njit(forceinline=True)
def is_real(row, spans, tokens):
    """Whether row number `row` of a batch lies in its example's span; without spans every one does."""
    if spans.shape[0] == 0:
        return True
    example, token = place(row, tokens)
    return spans[example, 0] <= token < spans[example, 1]


@cache
def _helpers(number: int) -> SimpleQueue[Callable[[], None]]:
    """Where `number` threads wait for work."""
    work: SimpleQueue[Callable[[], None]] = SimpleQueue()
    for _ in range(number):
        Thread(target=_serve, args=(work,), name="dist-reg", daemon=True).start()
    return work


def _serve(work: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        work.get()()


# A forked child (a DataLoader worker) inherits the queue without its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def for_rows(function: Callable[..., None], rows: int, columns: int, arguments: tuple[Any, ...]) -> None:
    """Run `function(begin, end, *arguments)` over all rows, in pieces that the threads take in turns.

    After an operation of torch's own its OpenMP threads spin for milliseconds on the cores that ours are to run on:
    a thread gets few pieces or none then, and this one waits for no thread that has not begun.
    """
    threads = max(1, min(torch.get_num_threads(), rows, rows * columns // ELEMENTS_PER_THREAD))
    if threads == 1:
        function(0, rows, *arguments)
        return
    pieces = min(rows, PIECES * threads)
    turns = iter([(rows * i // pieces, rows * (i + 1) // pieces) for i in range(pieces)])

    def share() -> None:
        for begin, end in turns:
            function(begin, end, *arguments)

    errors: list[BaseException] = []
    begun = [Lock() for _ in range(threads - 1)]
    for lock in begun:
        _helpers(torch.get_num_threads() - 1).put(partial(_help, share, lock, errors))
    share()
    for lock in begun:
        lock.acquire()
    if errors:
        raise errors[0]


def _help(share: Callable[[], None], lock: Lock, errors: list[BaseException]) -> None:
    """Take part in the work that `share` does, unless the caller holds `lock` already: it has finished."""
    if lock.acquire(blocking=False):
        try:
            share()
        except BaseException as error:
            errors.append(error)
        finally:
            lock.release()


def as_rows(tensor: Tensor) -> np.ndarray:
    """A tensor [..., C] as a NumPy array [rows, C], copied only where it is not contiguous; bf16 as uint16."""
    flat = tensor.detach().contiguous()
    array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
    return array.reshape(-1, array.shape[-1])


def span_array(spans: Tensor | None) -> np.ndarray:
    """`spans` as the compiled loops take them."""
    return NO_SPANS if spans is None else spans.contiguous().numpy()
