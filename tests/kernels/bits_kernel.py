"""A Triton kernel that writes the raw integers of one block, for test_philox.py."""

import triton
import triton.language as tl
from dist_reg_kernels.philox import triton_bits


@triton.jit
def store_bits(arguments_ptr, out_ptr):
    c0 = tl.load(arguments_ptr + tl.arange(0, 1)).to(tl.uint32)
    c1 = tl.load(arguments_ptr + 1).to(tl.uint32)
    c2 = tl.load(arguments_ptr + 2).to(tl.uint32)
    c3 = tl.load(arguments_ptr + 3).to(tl.uint32)
    k0 = tl.load(arguments_ptr + 4).to(tl.uint32)
    k1 = tl.load(arguments_ptr + 5).to(tl.uint32)
    r0, r1, r2, r3 = triton_bits(c0, c1, c2, c3, k0, k1)
    lane = tl.arange(0, 1)
    tl.store(out_ptr + lane, r0.to(tl.int64))
    tl.store(out_ptr + 1 + lane, r1.to(tl.int64))
    tl.store(out_ptr + 2 + lane, r2.to(tl.int64))
    tl.store(out_ptr + 3 + lane, r3.to(tl.int64))
