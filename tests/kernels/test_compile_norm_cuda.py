"""The norm kernels compile for Ampere and Hopper without a GPU, without spills, with wide loads and stores.

Run in a process of its own, because a process that interprets Triton cannot compile it.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.kernels.test_compile_cuda import CAPABILITIES, DTYPES, SHARED_MEMORY_LIMIT, resources

WHOLE_ROW, LONG_ROW = 8192, 16384
# 512 threads leave 128 registers each.
REGISTER_LIMIT = 128
OPERATIONS = ("layer_norm", "rms_norm", "layer_norm_backward", "rms_norm_backward")


@pytest.fixture(scope="module")
def builds() -> list[dict]:
    """One entry for each build: what it was built for, its shared memory and, if readable, its registers."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_variant_builds(builds):
    assert len(builds) == len(CAPABILITIES) * (len(DTYPES) + 1) * len(OPERATIONS)


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
        assert build["wide_load"], build
        assert build["wide_store"], build


def main() -> None:
    sizes = [(dtype, WHOLE_ROW) for dtype in DTYPES] + [("bf16", LONG_ROW)]
    variants = itertools.product(CAPABILITIES, sizes, OPERATIONS)
    print(json.dumps([build(capability, *size, operation) for capability, size, operation in variants]))


def build(capability: int, dtype: str, channels: int, operation: str) -> dict:
    import triton
    from dist_reg_kernels import norm_perturb
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    blocks, warps = norm_perturb.block_and_warps(channels)
    whole = channels <= 4 * blocks
    kernel, constants = kernel_and_constants(operation, whole)
    constants["BLOCKS"] = blocks
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(name, dtype) for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name == "channels"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": operation.endswith("backward")},
    )
    text = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    return {
        "capability": capability,
        "dtype": dtype,
        "channels": channels,
        "operation": operation,
        "warps": warps,
        "shared": compiled.metadata.shared,
        "registers": registers,
        "stack": stack,
        "wide_load": "ld.global.v4.b32" in text,
        "wide_store": "st.global.v4.b32" in text,
    }


def kernel_and_constants(operation: str, whole: bool) -> tuple:
    """A kernel and what it is specialised for: the costliest of its variants."""
    from dist_reg_kernels import norm_backward, norm_perturb

    if not operation.endswith("backward"):
        forward = {
            "HAS_RESIDUAL": True,
            "NOISE": True,
            "DISTRIBUTION": 0,
            "RELATIVE": True,
            "HAS_SPANS": True,
            "WHOLE": whole,
        }
        kernels = (norm_perturb._layer_norm_perturb_kernel, norm_perturb._perturb_rms_norm_kernel)
        return kernels[operation == "rms_norm"], forward
    centred = operation == "layer_norm_backward"
    absent = ("stream_gradient_ptr",) if centred else ("residual_ptr", "mean_ptr", "bias_sums_ptr")
    backward = {
        "CENTRED": centred,
        "HAS_RESIDUAL": centred,
        "HAS_STREAM_GRADIENT": not centred,
        "WITH_WEIGHT": True,
        **dict.fromkeys(absent),
    }
    return (
        norm_backward._norm_backward_kernel if whole else norm_backward._long_norm_backward_kernel,
        backward,
    )


def type_of(name: str, dtype: str) -> str:
    """The streams are of `dtype`, the parameters and all statistics fp32."""
    if name in ("sigma", "epsilon"):
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name in ("keys_ptr", "spans_ptr"):
        return "*i64"
    streams = ("hidden", "residual", "stream", "out", "normed", "gradient", "stream_gradient")
    return f"*{dtype}" if name.removesuffix("_ptr") in streams else "*fp32"


if __name__ == "__main__":
    main()
