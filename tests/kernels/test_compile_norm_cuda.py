"""The norm kernels compile for Ampere and Hopper without a GPU, without spills, with wide loads and stores."""

import itertools
import json

import pytest

from tests.kernels.cross_compile import CAPABILITIES, DTYPES, check_resources, cross_compile, run_as_program

WHOLE_ROW, LONG_ROW = 8192, 16384
# 512 threads leave 128 registers each.
REGISTER_LIMIT = 128
OPERATIONS = ("layer_norm", "rms_norm", "layer_norm_backward", "rms_norm_backward")


@pytest.fixture(scope="module")
def builds() -> list[dict]:
    """One entry for each build: what it was built for and what it takes."""
    return run_as_program(__file__)


def test_every_variant_builds(builds):
    assert len(builds) == len(CAPABILITIES) * (len(DTYPES) + 1) * len(OPERATIONS)


def test_nothing_spills(builds):
    for build in builds:
        check_resources(build, REGISTER_LIMIT)


def test_loads_and_stores_are_16_bytes_wide(builds):
    for build in builds:
        assert build["wide_load"], build
        assert build["wide_store"], build


def main() -> None:
    sizes = [(dtype, WHOLE_ROW) for dtype in DTYPES] + [("bf16", LONG_ROW)]
    variants = itertools.product(CAPABILITIES, sizes, OPERATIONS)
    print(json.dumps([build(capability, *size, operation) for capability, size, operation in variants]))


def build(capability: int, dtype: str, channels: int, operation: str) -> dict:
    from dist_reg_kernels import norm_perturb

    blocks, warps = norm_perturb.block_and_warps(channels)
    kernel, constants = kernel_and_constants(operation, whole=channels <= 4 * blocks)
    constants["BLOCKS"] = blocks
    types = {name: type_of(name, dtype) for name in kernel.arg_names}
    pointers = [name for name in kernel.arg_names if types[name].startswith("*") and name not in constants]
    return {
        "capability": capability,
        "dtype": dtype,
        "channels": channels,
        "operation": operation,
        **cross_compile(
            kernel,
            types,
            constants,
            [*pointers, "channels"],
            capability=capability,
            warps=warps,
            fp_fusion=operation.endswith("backward"),
        ),
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
