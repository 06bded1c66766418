"""The Triton kernels compile for Ampere and Hopper on a machine without a GPU.

Run in a process of its own, because a process that interprets Triton cannot compile it.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

DTYPES = ("fp32", "bf16", "fp16")
CAPABILITIES = (80, 90)
CHANNELS, VOCABULARY = 1024, 32000
SHARED_MEMORY_LIMIT = 16 * 1024
REGISTER_LIMIT = 64


@pytest.fixture(scope="module")
def builds() -> list[dict]:
    """One entry for each build: what it was built for, its shared memory and, if readable, its registers."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_variant_builds(builds):
    each = len(CAPABILITIES) * len(DTYPES)
    assert Counter(build["kernel"] for build in builds) == {
        "_perturb_kernel": each * 3 * 2,
        "_symmetric_kl_kernel": each * 2,
        "_combine_kernel": each,
        "_symmetric_kl_backward_kernel": each,
    }


def test_shared_memory_is_small(builds):
    for build in builds:
        assert build["shared"] <= SHARED_MEMORY_LIMIT, build


def test_nothing_spills(builds):
    if builds[0]["registers"] is None:
        pytest.skip("this Triton ships no cuobjdump")
    for build in builds:
        assert build["stack"] == 0, build
        assert build["registers"] <= REGISTER_LIMIT, build


def test_loads_and_stores_are_16_bytes_wide(builds):
    for build in builds:
        assert build["wide_load"] or build["narrow"], build
        assert build["wide_store"] or build["narrow"] or build["reduces"], build


class Variant(NamedTuple):
    """One way that a launcher calls a kernel; arguments in neither `types` nor `constants` are int32."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    """Pointers at multiples of 16 bytes and integers that 16 divides."""
    warps: int
    fp_fusion: bool
    reduces: bool = False
    """Writes a few numbers a row, not a stream."""
    narrow: bool = False
    """Reads no stream either."""


def perturb_variants(dtype: str) -> Iterator[Variant]:
    from dist_reg_kernels import perturb

    blocks, warps = perturb.block_and_warps(CHANNELS)
    types = {
        "hidden_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        "keys_ptr": "*i64",
        "spans_ptr": "*i32",
        "sigma": "fp32",
    }
    aligned = ("hidden_ptr", "out_ptr", "keys_ptr", "spans_ptr", "stride_batch", "stride_token", "channels")
    for distribution, relative in itertools.product(range(3), (False, True)):
        constants = {
            "stride_channel": 1,
            "DISTRIBUTION": distribution,
            "RELATIVE": relative,
            "HAS_SPANS": True,
            "BLOCKS": blocks,
        }
        yield Variant(perturb._perturb_kernel, types, constants, aligned, warps, fp_fusion=False)


def symmetric_kl_variants(dtype: str) -> Iterator[Variant]:
    from dist_reg_kernels import symmetric_kl

    types = dict.fromkeys(("a_ptr", "b_ptr", "gradient_a_ptr", "gradient_b_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("loss_ptr", "saved_ptr", "parts_ptr", "gradient_ptr"), "*fp32") | {
        "mask_ptr": "*i1"
    }
    aligned = ("a_ptr", "b_ptr", "a_outer", "a_inner", "b_outer", "b_inner", "columns")
    unit = {"a_column": 1, "b_column": 1, "HAS_MASK": True}
    lanes, width, warps = symmetric_kl.lanes_width_and_warps(VOCABULARY, 4 if dtype == "fp32" else 2)
    close = {"CLOSE": dtype == "fp32"}
    for parts in (1, 8):
        constants = unit | close | {"PARTS": parts, "LANES": lanes, "WIDTH": width}
        kernel = symmetric_kl._symmetric_kl_kernel
        yield Variant(kernel, types, constants, (*aligned, "part_columns"), warps, True, reduces=True)
    constants = close | {"HAS_MASK": True, "PARTS": 8}
    yield Variant(symmetric_kl._combine_kernel, types, constants, (), 1, True, narrow=True)
    block, warps = symmetric_kl.block_and_warps(VOCABULARY)
    kernel = symmetric_kl._symmetric_kl_backward_kernel
    aligned = (*aligned, "gradient_a_ptr", "gradient_b_ptr")
    yield Variant(kernel, types, unit | {"BLOCK": block}, aligned, warps, True)


FAMILIES = (perturb_variants, symmetric_kl_variants)


def main() -> None:
    report = [
        build(capability, dtype, variant)
        for capability, dtype, family in itertools.product(CAPABILITIES, DTYPES, FAMILIES)
        for variant in family(dtype)
    ]
    print(json.dumps(report))


def build(capability: int, dtype: str, variant: Variant) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, aligned, warps, fp_fusion, reduces, narrow = variant
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": fp_fusion},
    )
    text = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    return {
        "kernel": kernel.fn.__name__,
        "capability": capability,
        "dtype": dtype,
        "constants": constants,
        "warps": warps,
        "reduces": reduces,
        "narrow": narrow,
        "shared": compiled.metadata.shared,
        "registers": registers,
        "stack": stack,
        "wide_load": "ld.global.v4.b32" in text,
        "wide_store": "st.global.v4.b32" in text,
    }


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack (where spilled registers go) of a cubin, or None where no tool reads them."""
    import triton

    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError):
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return (int(found[1]), int(found[2])) if found else (None, None)


if __name__ == "__main__":
    main()
