"""Times of the operations, of plain torch, of torch.compile and of a copy, all taking turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_reg.bench.check import CheckFailed, Errors, check, upstream_of
from dist_reg.bench.operations import OPERATIONS, Batch, Operation, Outputs, make_batch
from dist_reg.errors import reason
from dist_reg.ops.backend import backend_of

VARIANTS = ("ours", "eager", "compile")
WARM_UP = 2

Shape = tuple[int, int, int]
Row = dict[str, Any]


class Timer(NamedTuple):
    """One thing to time; `prepare` runs outside the clock and hands its result to `run`."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Case(NamedTuple):
    """An operation that passed its check in one shape and dtype: its timers by (variant, pass)."""

    errors: dict[str, Errors]
    timers: dict[tuple[str, str], Timer]
    largest: int
    """Elements of the largest tensor that it reads or writes: the size of the copy it is compared with."""
    note: str


def measure(shape: Shape, dtype: torch.dtype, device: str, rounds: int, compiled: bool) -> list[Row]:
    """A row for each pass of each operation. One whose check fails is not timed; its row says why."""
    batch = make_batch(shape, dtype, device)
    cases: dict[str, Case | str] = {
        name: _case(operation, batch, compiled) for name, operation in OPERATIONS.items()
    }
    ready = {name: case for name, case in cases.items() if isinstance(case, Case)}
    timers = {(name, *key): timer for name, case in ready.items() for key, timer in case.timers.items()}
    copies = {("copy", case.largest): _copy(case.largest, dtype, device) for case in ready.values()}
    times = _take_turns({**timers, **copies}, device, rounds)

    rows = []
    for name, case in cases.items():
        operation = OPERATIONS[name]
        for which in operation.passes:
            row = _empty_row(name, which, shape, dtype, batch)
            row["bytes"] = operation.bytes_moved(which, batch)
            if isinstance(case, Case):
                row |= _timed(row["bytes"], times, case, name, which, batch.hidden.element_size())
                if device == "cuda":
                    row["extra_bytes"] = _extra_memory(case.timers["ours", which])
            else:
                row["refused"] = case
            rows.append(row)
    return rows


def _case(operation: Operation, batch: Batch, compiled: bool) -> Case | str:
    """The case, or why it is refused."""
    try:
        errors = check(operation, batch)
    except CheckFailed as failed:
        return str(failed)
    except Exception as error:  # a kernel that does not run is a kernel that fails its check
        return f"{type(error).__name__}: {reason(error)}"
    streams = [stream.detach().requires_grad_() for stream in operation.streams(batch)]
    outputs = operation.ours(batch, *streams)
    upstream = upstream_of(outputs)
    functions: dict[str, Callable[..., Outputs]] = {
        "ours": partial(operation.ours, batch),
        "eager": partial(operation.plain, operation.eager_noise, batch),
    }
    note = "" if compiled else "compile left out"
    if compiled:
        # A compiled function of its own for every shape: none is compiled a second time for sizes that change.
        function = torch.compile(functions["eager"], fullgraph=True, dynamic=False)
        try:
            # Operations that share their code, as both kinds of noise do, count as recompilations of one another.
            with torch._dynamo.config.patch(recompile_limit=64):
                _passes(function, streams, upstream)["both"].run(None)
            functions["compile"] = function
        except Exception as error:  # no C++ compiler, a backend that is missing
            note = f"compile: {type(error).__name__}: {reason(error)}"
    timers = {
        (variant, which): timer
        for variant, function in functions.items()
        for which, timer in _passes(function, streams, upstream).items()
        if which in operation.passes
    }
    return Case(errors, timers, max(tensor.numel() for tensor in (*streams, *outputs)), note)


def _passes(
    function: Callable[..., Outputs], streams: Sequence[Tensor], upstream: list[Tensor]
) -> dict[str, Timer]:
    given = [gradient.to(output.dtype) for gradient, output in zip(upstream, function(*streams))]

    def forward(_: object = None) -> Outputs:
        return function(*streams)

    def backward(outputs: Outputs) -> Outputs:
        return torch.autograd.grad(outputs, streams, given)

    return {
        "forward": Timer(_nothing, forward),
        "backward": Timer(forward, backward),
        "both": Timer(_nothing, lambda _: backward(forward())),
    }


def _copy(elements: int, dtype: torch.dtype, device: str) -> Timer:
    source, target = torch.zeros(2, elements, dtype=dtype, device=device)
    return Timer(_nothing, lambda _: target.copy_(source))


def _nothing() -> None:
    return None


def _take_turns(timers: dict[Any, Timer], device: str, rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of every timer, once a round."""
    times: dict[Any, list[float]] = {key: [] for key in timers}
    keys = list(timers)
    clock = _clock_cuda if device == "cuda" else _clock_cpu
    for round_ in range(rounds + WARM_UP):
        # Each round starts elsewhere, so that none always follows the same one.
        start = round_ * 7 % max(len(keys), 1)
        for key in keys[start:] + keys[:start]:
            took = clock(timers[key])
            if round_ >= WARM_UP:
                times[key].append(took)
    return times


def _clock_cpu(timer: Timer) -> float:
    prepared = timer.prepare()
    start = time.perf_counter()
    result = timer.run(prepared)
    took = (time.perf_counter() - start) * 1e3
    del result
    return took


def _clock_cuda(timer: Timer) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepared = timer.prepare()
    # About a millisecond of waiting on the device: Python has queued all the work when the first kernel starts, and
    # what the launches cost stays out of the figure.
    torch.cuda._sleep(2_000_000)
    start.record()
    result = timer.run(prepared)
    end.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(end)


def _extra_memory(timer: Timer) -> int:
    """Bytes that the allocator held at the peak of a CUDA run beyond what was there before or is left after it."""
    prepared = timer.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = timer.run(prepared)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - max(before, torch.cuda.memory_allocated())
    del result
    return extra


def _empty_row(name: str, which: str, shape: Shape, dtype: torch.dtype, batch: Batch) -> Row:
    """Every column, so that a row that was refused has them too."""
    times = {f"{variant}_ms{end}": None for variant in VARIANTS for end in ("", "_low", "_high")}
    figures = ("copy_gb_per_s", "ours_gb_per_s", "fraction_of_copy", "times_eager", "times_compile")
    errors = ("error", "plain_error", "extra_bytes")
    return {
        "operation": name,
        "pass": which,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend_of(batch.hidden),
        "bytes": None,
        **times,
        **dict.fromkeys(figures + errors),
        "refused": None,
        "note": "",
    }


def _timed(moved: int, times: dict[Any, list[float]], case: Case, name: str, which: str, size: int) -> Row:
    row: Row = {"note": case.note, "error": case.errors[which].ours, "plain_error": case.errors[which].plain}
    ours = times[name, "ours", which]
    for variant in VARIANTS:
        values = times.get((name, variant, which))
        if values is not None:
            low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
            row |= {f"{variant}_ms": statistics.median(values)}
            row |= {f"{variant}_ms_low": low, f"{variant}_ms_high": high}
            if variant != "ours":
                row[f"times_{variant}"] = statistics.median(v / o for v, o in zip(values, ours))
    copy_seconds = statistics.median(times["copy", case.largest]) * 1e-3
    row["copy_gb_per_s"] = 2 * case.largest * size / copy_seconds * 1e-9
    row["ours_gb_per_s"] = moved / (row["ours_ms"] * 1e-3) * 1e-9
    row["fraction_of_copy"] = row["ours_gb_per_s"] / row["copy_gb_per_s"]
    return row
