"""S = KL(p || q) + KL(q || p) with p = softmax(a), q = softmax(b), for every row of two tensors of logits.

a, b [..., V], any strides; S [...] in fp32 (float64 for float64 input). The softmaxes are never stored: forward
reads 2V numbers a row once, backward reads 2V and writes 2V. Rows where `mask` [...] is False give 0, take a
gradient of 0 and are not read.

Forward. S = E_p[u] - E_q[u] for u = a - b less any constant. In one pass, with the row's maxima so far A and B,
x = exp(a - A), y = exp(b - B) and u = (a - A) - (b - B), the sums are

    Zp = sum x    Zq = sum y    Y = sum x u    U = sum y u    D = sum (x - y)    X = sum (x - y) u

and S = Y / Zp - U / Zq. Where the two rows nearly agree this would subtract almost equal numbers; there x - y is
y expm1(u) and S = (X - D U / Zq) / Zp, a covariance, holds to a few ulp. Half precision needs neither D nor X:
distinct logits already differ by more than the rounding of the sums.

Backward, with g the gradient of S. Seven numbers a row are saved: A, B, 1/Zp, 1/Zq, E_p[u], E_q[u] and
w = log(Zp / Zq). With the log-sum-exps alone, p of logits around 1e4 would be wrong in the fourth digit.

    dS/da = g (p (u - E_p[u]) + (p - q))     dS/db = -g (q (u - E_q[u]) + (p - q))     p - q = q expm1(u - w)

Infinite logits. An entry that is -inf in both rows (a masked vocabulary entry) contributes nothing. One that is
-inf in one row only makes S inf, as the mathematics has it, and the row's gradient NaN. +inf, NaN, or a row of -inf
alone give NaN as softmax does.

Source: R-Drop, arXiv 2106.14448 (its regulariser is S / 2); R3F, arXiv 2008.03156 (its KL_S is S).
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SAVED = 7
"""Numbers a row that forward saves for backward."""


def symmetric_kl_reference(a: Tensor, b: Tensor) -> Tensor:
    """S [...] of a, b [..., V], computed in their dtype."""
    log_p, log_q = a.log_softmax(dim=-1), b.log_softmax(dim=-1)
    difference = torch.where(a.isneginf() & b.isneginf(), 0.0, log_p - log_q)
    return ((log_p.exp() - log_q.exp()) * difference).sum(dim=-1)


def symmetric_kl_torch(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The fallback in plain torch: S [...] and what backward needs [..., 7]; stores the softmaxes."""
    a, b = _wide(a), _wide(b)
    top_a, top_b = a.amax(dim=-1), b.amax(dim=-1)
    x, y = (a - top_a[..., None]).exp(), (b - top_b[..., None]).exp()
    u = _relative(a, b, top_a, top_b)
    total_x, total_y = x.sum(dim=-1), y.sum(dim=-1)
    ratio = _less(x, y, u).sum(dim=-1) / total_y
    log_ratio = torch.where(ratio.abs() < 0.5, ratio.log1p(), (total_x / total_y).log())
    p, q = x / total_x[..., None], y / total_y[..., None]
    rest = u - log_ratio[..., None]
    loss = (_less(p, q, rest) * rest).sum(dim=-1)
    infinite = u.isinf().any(dim=-1) & (total_x + total_y).isfinite()
    loss = torch.where(infinite, torch.inf, loss)
    mean_p, mean_q = (torch.where(infinite, torch.nan, (x * u).sum(dim=-1)) for x in (p, q))
    saved = torch.stack((top_a, top_b, 1 / total_x, 1 / total_y, mean_p, mean_q, log_ratio), dim=-1)
    if mask is not None:
        loss, saved = torch.where(mask, loss, 0.0), torch.where(mask[..., None], saved, 0.0)
    return loss, saved


def symmetric_kl_backward_torch(
    gradient: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """The fallback in plain torch: the gradients of a and b from that of S [...]."""
    dtype = a.dtype
    a, b = _wide(a), _wide(b)
    u = _relative(a, b, saved[..., 0], saved[..., 1])
    top_a, top_b, scale_p, scale_q, mean_p, mean_q, log_ratio = saved[..., None, :].unbind(dim=-1)
    p, q = (a - top_a).exp() * scale_p, (b - top_b).exp() * scale_q
    less = _less(p, q, u - log_ratio)
    gradient = gradient.contiguous()[..., None]
    gradient_a = gradient * (p * (u - mean_p) + less)
    gradient_b = -gradient * (q * (u - mean_q) + less)
    if mask is not None:
        gradient_a = torch.where(mask[..., None], gradient_a, 0.0)
        gradient_b = torch.where(mask[..., None], gradient_b, 0.0)
    return gradient_a.to(dtype), gradient_b.to(dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def _relative(a: Tensor, b: Tensor, top_a: Tensor, top_b: Tensor) -> Tensor:
    """(a - top_a) - (b - top_b), in the order that rounds least; 0 where a and b are both -inf."""
    top_a, top_b = top_a[..., None], top_b[..., None]
    offset = top_a - top_b
    u = torch.where(offset.abs() < 8.0, (a - b) - offset, (a - top_a) - (b - top_b))
    return torch.where(a.isneginf() & b.isneginf(), 0.0, u)


def _less(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """x - y where x = y exp(u)."""
    return torch.where(u.abs() < 0.125, y * u.expm1(), x - y)


def _add(x, y):
    return x + y


def _maximum(x, y):
    return tl.maximum(x, y)


def _triton_exp(x):
    # Without .ftz, as tl.exp has it, six of the thirty instructions a column of half precision would save denormals.
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], tl.float32, is_pure=True, pack=1
    )


def _interpreted_exp(x):
    return tl.exp(x)


def _triton_less(x, y, u):
    """x - y where x = y exp(u)."""
    series = tl.fma(u, tl.fma(u, tl.fma(u, tl.fma(u, 1 / 120, 1 / 24), 1 / 6), 0.5), 1.0)
    return tl.where(tl.abs(u) < 0.125, y * u * series, x - y)


def _triton_relative(a, b, top_a, top_b):
    """(a - top_a) - (b - top_b), in the order that rounds least: a - b is exact where a and b are close."""
    offset = top_a - top_b
    return tl.where(tl.abs(offset) < 8.0, (a - b) - offset, (a - top_a) - (b - top_b))


def _move(top_a, top_b, new_a, new_b, zp, zq, py, qu, dd, xu, CLOSE: tl.constexpr):
    """The sums after the maxima have moved from top_a, top_b to new_a, new_b."""
    shift = _triton_relative(top_a, top_b, new_a, new_b)
    scale_a = _triton_exp(top_a - new_a)
    scale_b = _triton_exp(top_b - new_b)
    if CLOSE:
        less = _triton_less(scale_a, scale_b, shift)
        new_d = scale_a * dd + less * zq
        xu = scale_a * xu + less * qu + shift * new_d
        dd = new_d
    py = scale_a * (py + shift * zp)
    qu = scale_b * (qu + shift * zq)
    return scale_a * zp, scale_b * zq, py, qu, dd, xu


def _merge(top_a, top_b, zp, zq, py, qu, dd, xu, CLOSE: tl.constexpr):
    """One state from a vector of them."""
    new_a = tl.reduce(top_a, 0, _maximum)
    new_b = tl.reduce(top_b, 0, _maximum)
    zp, zq, py, qu, dd, xu = _move(top_a, top_b, new_a, new_b, zp, zq, py, qu, dd, xu, CLOSE)
    zp = tl.reduce(zp, 0, _add)
    zq = tl.reduce(zq, 0, _add)
    py = tl.reduce(py, 0, _add)
    qu = tl.reduce(qu, 0, _add)
    if CLOSE:
        dd = tl.reduce(dd, 0, _add)
        xu = tl.reduce(xu, 0, _add)
    return new_a, new_b, zp, zq, py, qu, dd, xu


def _finish(loss_ptr, saved_ptr, row, top_a, top_b, zp, zq, py, qu, dd, xu, CLOSE: tl.constexpr):
    """Store S and what backward needs from the sums of a whole row."""
    mean_p = py / zp
    mean_q = qu / zq
    loss = mean_p - mean_q
    if CLOSE:
        ratio = dd / zq
        loss = tl.where(tl.abs(ratio) < 0.5, (xu - ratio * qu) / zp, loss)
    else:
        ratio = (zp - zq) / zq
    s = ratio / (2.0 + ratio)
    s2 = s * s
    log_ratio = 2.0 * s * tl.fma(s2, tl.fma(s2, tl.fma(s2, 1 / 7, 1 / 5), 1 / 3), 1.0)  # of 1 + ratio
    log_ratio = tl.where(tl.abs(ratio) < 0.25, log_ratio, tl.log(zp / zq))
    finite = tl.abs(py + qu) < float("inf")
    infinite = (tl.abs(zp + zq) < float("inf")) & (zp + zq > 0.0) & (finite == 0)
    loss = tl.where(infinite, float("inf"), loss)
    mean_p = tl.where(infinite, float("nan"), mean_p)
    mean_q = tl.where(infinite, float("nan"), mean_q)
    tl.store(loss_ptr + row, loss)
    tl.store(saved_ptr + 7 * row, top_a)
    tl.store(saved_ptr + 7 * row + 1, top_b)
    tl.store(saved_ptr + 7 * row + 2, 1.0 / zp)
    tl.store(saved_ptr + 7 * row + 3, 1.0 / zq)
    tl.store(saved_ptr + 7 * row + 4, mean_p)
    tl.store(saved_ptr + 7 * row + 5, mean_q)
    tl.store(saved_ptr + 7 * row + 6, log_ratio)


def _finish_masked(loss_ptr, saved_ptr, row):
    tl.store(loss_ptr + row, 0.0)
    for i in tl.static_range(7):
        tl.store(saved_ptr + 7 * row + i, 0.0)


def _symmetric_kl_kernel(
    a_ptr,
    b_ptr,
    mask_ptr,
    loss_ptr,
    saved_ptr,
    parts_ptr,
    a_outer,
    a_inner,
    a_column,
    b_outer,
    b_inner,
    b_column,
    inner,
    columns,
    part_columns,
    HAS_MASK: tl.constexpr,
    CLOSE: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // PARTS
    part = (program % PARTS).to(tl.int32)
    live = row >= 0
    if HAS_MASK:
        live = tl.load(mask_ptr + row) != 0
    if live:
        a_row = a_ptr + (row // inner) * a_outer + (row % inner) * a_inner
        b_row = b_ptr + (row // inner) * b_outer + (row % inner) * b_inner
        # The lowest finite number, not -inf: an empty lane's differences stay finite.
        top_a = tl.full((LANES,), -3.4028234663852886e38, tl.float32)
        top_b = top_a
        zp = tl.full((LANES,), 0.0, tl.float32)
        zq = zp
        py = zp
        qu = zp
        dd = zp
        xu = zp
        lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        first = part * part_columns
        last = tl.minimum(first + part_columns, columns)
        for start in range(first, last, LANES * WIDTH):
            column = start + lane
            inside = column < last
            far = column.to(tl.int64)
            a = tl.load(a_row + far * a_column, mask=inside, other=float("-inf")).to(tl.float32)
            b = tl.load(b_row + far * b_column, mask=inside, other=float("-inf")).to(tl.float32)
            new_a = tl.maximum(top_a, tl.reduce(a, 1, _maximum))
            new_b = tl.maximum(top_b, tl.reduce(b, 1, _maximum))
            zp, zq, py, qu, dd, xu = _move(top_a, top_b, new_a, new_b, zp, zq, py, qu, dd, xu, CLOSE)
            top_a = new_a
            top_b = new_b
            x = _triton_exp(a - top_a[:, None])
            y = _triton_exp(b - top_b[:, None])
            if CLOSE:
                u = _triton_relative(a, b, top_a[:, None], top_b[:, None])
            else:
                u = (a - top_a[:, None]) - (b - top_b[:, None])
            # -inf in both rows is NaN here and contributes 0; in one row, the sums below turn inf or NaN.
            u = tl.where(u == u, u, 0.0)
            zp += tl.reduce(x, 1, _add)
            zq += tl.reduce(y, 1, _add)
            py += tl.reduce(x * u, 1, _add)
            qu += tl.reduce(y * u, 1, _add)
            if CLOSE:
                less = _triton_less(x, y, u)
                dd += tl.reduce(less, 1, _add)
                xu += tl.reduce(less * u, 1, _add)
        top_a, top_b, zp, zq, py, qu, dd, xu = _merge(top_a, top_b, zp, zq, py, qu, dd, xu, CLOSE)
        if PARTS == 1:
            _finish(loss_ptr, saved_ptr, row, top_a, top_b, zp, zq, py, qu, dd, xu, CLOSE)
        else:
            tl.store(parts_ptr + 8 * program, top_a)
            tl.store(parts_ptr + 8 * program + 1, top_b)
            tl.store(parts_ptr + 8 * program + 2, zp)
            tl.store(parts_ptr + 8 * program + 3, zq)
            tl.store(parts_ptr + 8 * program + 4, py)
            tl.store(parts_ptr + 8 * program + 5, qu)
            if CLOSE:
                tl.store(parts_ptr + 8 * program + 6, dd)
                tl.store(parts_ptr + 8 * program + 7, xu)
    elif PARTS == 1:
        _finish_masked(loss_ptr, saved_ptr, row)


def _combine_kernel(
    parts_ptr, mask_ptr, loss_ptr, saved_ptr, HAS_MASK: tl.constexpr, CLOSE: tl.constexpr, PARTS: tl.constexpr
):
    """The row's sums from those of its parts."""
    row = tl.program_id(0).to(tl.int64)
    live = row >= 0
    if HAS_MASK:
        live = tl.load(mask_ptr + row) != 0
    if live:
        part = parts_ptr + 8 * (row * PARTS + tl.arange(0, PARTS))
        top_a = tl.load(part)
        top_b = tl.load(part + 1)
        zp = tl.load(part + 2)
        zq = tl.load(part + 3)
        py = tl.load(part + 4)
        qu = tl.load(part + 5)
        dd = zp
        xu = py
        if CLOSE:
            dd = tl.load(part + 6)
            xu = tl.load(part + 7)
        top_a, top_b, zp, zq, py, qu, dd, xu = _merge(top_a, top_b, zp, zq, py, qu, dd, xu, CLOSE)
        _finish(loss_ptr, saved_ptr, row, top_a, top_b, zp, zq, py, qu, dd, xu, CLOSE)
    else:
        _finish_masked(loss_ptr, saved_ptr, row)


def _symmetric_kl_backward_kernel(
    gradient_ptr,
    a_ptr,
    b_ptr,
    mask_ptr,
    saved_ptr,
    gradient_a_ptr,
    gradient_b_ptr,
    a_outer,
    a_inner,
    a_column,
    b_outer,
    b_inner,
    b_column,
    inner,
    columns,
    chunks,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    column = (program % chunks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dtype = gradient_a_ptr.dtype.element_ty
    out_a = gradient_a_ptr + row * columns + column
    out_b = gradient_b_ptr + row * columns + column
    live = row >= 0
    if HAS_MASK:
        live = tl.load(mask_ptr + row) != 0
    if live:
        far = column.to(tl.int64)
        a_row = a_ptr + (row // inner) * a_outer + (row % inner) * a_inner
        b_row = b_ptr + (row // inner) * b_outer + (row % inner) * b_inner
        a = tl.load(a_row + far * a_column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_row + far * b_column, mask=inside, other=0.0).to(tl.float32)
        saved = saved_ptr + 7 * row
        top_a = tl.load(saved)
        top_b = tl.load(saved + 1)
        p = _triton_exp(a - top_a) * tl.load(saved + 2)
        q = _triton_exp(b - top_b) * tl.load(saved + 3)
        u = _triton_relative(a, b, top_a, top_b)
        u = tl.where(u == u, u, 0.0)
        less = _triton_less(p, q, u - tl.load(saved + 6))
        gradient = tl.load(gradient_ptr + row)
        gradient_a = gradient * (p * (u - tl.load(saved + 4)) + less)
        gradient_b = -gradient * (q * (u - tl.load(saved + 5)) + less)
        tl.store(out_a, gradient_a.to(dtype), mask=inside)
        tl.store(out_b, gradient_b.to(dtype), mask=inside)
    else:
        zeros = tl.full((BLOCK,), 0.0, dtype)
        tl.store(out_a, zeros, mask=inside)
        tl.store(out_b, zeros, mask=inside)


if triton is not None:
    _triton_exp = triton.jit(_interpreted_exp if triton.knobs.runtime.interpret else _triton_exp)
    _add, _maximum, _triton_less, _triton_relative = map(
        triton.jit, (_add, _maximum, _triton_less, _triton_relative)
    )
    _move, _merge, _finish, _finish_masked = map(triton.jit, (_move, _merge, _finish, _finish_masked))
    _symmetric_kl_kernel = triton.jit(_symmetric_kl_kernel)
    _combine_kernel = triton.jit(_combine_kernel)
    _symmetric_kl_backward_kernel = triton.jit(_symmetric_kl_backward_kernel)


@lru_cache
def lanes_width_and_warps(columns: int, bytes_each: int) -> tuple[int, int, int]:
    """Sums that a forward program keeps side by side, columns that go into each at a time, and its warps.

    A lane takes one 16-byte load of each row, so that its maximum needs no exchange between threads.
    """
    width = 16 // bytes_each
    lanes = min(max(triton.next_power_of_2(-(-columns // width)), 32), 256)
    return lanes, width, min(max(lanes // 64, 1), 4)


@lru_cache
def parts_of_a_row(rows: int, columns: int, block: int, processors: int) -> int:
    """How many programs share a row: one where the rows alone fill the device; a part has four blocks or more."""
    wanted = -(-4 * processors // rows)
    possible = columns // (4 * block)
    return 1 if possible < 2 else min(triton.next_power_of_2(wanted), 1 << (possible.bit_length() - 1))


@lru_cache
def block_and_warps(columns: int) -> tuple[int, int]:
    """Columns that one backward program handles, and its warps: eight columns a thread."""
    block = min(max(triton.next_power_of_2(columns), 32), 2048)
    return block, min(max(block // 256, 1), 8)


def symmetric_kl_triton(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch forward: S [...] and what backward needs [..., 7]. fp32, bf16 and fp16, on a GPU or interpreted."""
    shape, columns = a.shape[:-1], a.shape[-1]
    loss = torch.empty(shape, dtype=torch.float32, device=a.device)
    saved = torch.empty((*shape, SAVED), dtype=torch.float32, device=a.device)
    rows = loss.numel()
    if rows == 0:
        return loss, saved
    a, b = _two_leading(a), _two_leading(b)
    lanes, width, warps = lanes_width_and_warps(columns, a.element_size())
    block = lanes * width
    parts = parts_of_a_row(rows, columns, block, _processors(a.device))
    part_columns = -(-columns // (parts * block)) * block
    sums = None if parts == 1 else torch.empty((rows, parts, 8), dtype=torch.float32, device=a.device)
    mask = None if mask is None else mask.contiguous()
    options = {"HAS_MASK": mask is not None, "CLOSE": a.dtype == torch.float32, "PARTS": parts}
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        _symmetric_kl_kernel[(rows * parts,)](
            a,
            b,
            mask,
            loss,
            saved,
            sums,
            *a.stride(),
            *b.stride(),
            a.shape[1],
            columns,
            part_columns,
            **options,
            LANES=lanes,
            WIDTH=width,
            num_warps=warps,
            enable_fp_fusion=True,  # fewer roundings; said because Triton's default is about to change
        )
        if parts > 1:
            _combine_kernel[(rows,)](sums, mask, loss, saved, **options, num_warps=1, enable_fp_fusion=True)
    return loss, saved


def symmetric_kl_backward_triton(
    gradient: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch backward: the gradients of a and b, contiguous, from that of S [...]."""
    gradient_a = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    gradient_b = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    columns = a.shape[-1]
    if a.numel() == 0:
        return gradient_a, gradient_b
    a, b = _two_leading(a), _two_leading(b)
    block, warps = block_and_warps(columns)
    chunks = -(-columns // block)
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        _symmetric_kl_backward_kernel[(a.shape[0] * a.shape[1] * chunks,)](
            gradient.contiguous(),
            a,
            b,
            None if mask is None else mask.contiguous(),
            saved,
            gradient_a,
            gradient_b,
            *a.stride(),
            *b.stride(),
            a.shape[1],
            columns,
            chunks,
            HAS_MASK=mask is not None,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,  # fewer roundings; said because Triton's default is about to change
        )
    return gradient_a, gradient_b


def _two_leading(tensor: Tensor) -> Tensor:
    """[..., V] as [outer, inner, V]: a copy only where there are more dimensions and strides that do not fold."""
    return tensor.reshape(1, -1, tensor.shape[-1]) if tensor.ndim < 3 else tensor.flatten(0, -3)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
