"""The kernels of symmetric_kl compile for Ampere and Hopper on a machine without a GPU."""

import itertools
import json
from collections import Counter

import pytest

from tests.kernels.cross_compile import CAPABILITIES, DTYPES, check_resources, cross_compile, run_as_program

VOCABULARY = 32000
REGISTER_LIMIT = 64


@pytest.fixture(scope="module")
def builds() -> list[dict]:
    """One entry for each build: what it was built for and what it takes."""
    return run_as_program(__file__)


def test_every_variant_builds(builds):
    each = len(CAPABILITIES) * len(DTYPES)
    assert Counter(build["kernel"] for build in builds) == {
        "forward": each,
        "forward in parts": each,
        "combine": each,
        "backward": each,
    }


def test_nothing_spills(builds):
    for build in builds:
        check_resources(build, REGISTER_LIMIT)


def test_loads_and_stores_are_16_bytes_wide(builds):
    for build in builds:
        assert build["wide_load"] or build["kernel"] == "combine", build
        assert build["wide_store"] or build["kernel"] != "backward", build


def main() -> None:
    print(json.dumps([one for key in itertools.product(CAPABILITIES, DTYPES) for one in family(*key)]))


def family(capability: int, dtype: str) -> list[dict]:
    """Every kernel of the file, as its launchers call it for one dtype."""
    from dist_reg_kernels import symmetric_kl

    types = dict.fromkeys(("a_ptr", "b_ptr", "gradient_a_ptr", "gradient_b_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("loss_ptr", "saved_ptr", "parts_ptr", "gradient_ptr"), "*fp32")
    types["mask_ptr"] = "*i1"
    streams = ("a_ptr", "b_ptr", "a_outer", "a_inner", "b_outer", "b_inner", "columns")
    unit = {"a_column": 1, "b_column": 1, "HAS_MASK": True}
    close = {"CLOSE": dtype == "fp32"}
    lanes, width, warps = symmetric_kl.lanes_width_and_warps(VOCABULARY, 4 if dtype == "fp32" else 2)
    block, backward_warps = symmetric_kl.block_and_warps(VOCABULARY)
    forward = unit | close | {"LANES": lanes, "WIDTH": width}
    kernel = symmetric_kl._symmetric_kl_kernel
    launches = {
        "forward": (kernel, forward | {"PARTS": 1}, (*streams, "part_columns"), warps),
        "forward in parts": (kernel, forward | {"PARTS": 8}, (*streams, "part_columns"), warps),
        "combine": (symmetric_kl._combine_kernel, close | {"HAS_MASK": True, "PARTS": 8}, (), 1),
        "backward": (
            symmetric_kl._symmetric_kl_backward_kernel,
            unit | {"BLOCK": block},
            (*streams, "gradient_a_ptr", "gradient_b_ptr"),
            backward_warps,
        ),
    }
    return [
        {
            "kernel": name,
            "capability": capability,
            "dtype": dtype,
            **cross_compile(
                function, types, constants, aligned, capability=capability, warps=warps, fp_fusion=True
            ),
        }
        for name, (function, constants, aligned, warps) in launches.items()
    ]


if __name__ == "__main__":
    main()
