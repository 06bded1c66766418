"""The kernels of layer_mix compile for Ampere and Hopper without a GPU, without spills."""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import pytest
from dist_reg_kernels.layer_mix import STATES_PER_LAUNCH

from tests.kernels.cross_compile import CAPABILITIES, DTYPES, check_resources, cross_compile, run_as_program

SIZES = (1024, 8192)
LAYERS = (6, STATES_PER_LAUNCH)
REGISTER_LIMIT = 128
KERNELS = {"forward": {"CARRIED": False}, "carried": {"CARRIED": True}, "backward": {}}


@pytest.fixture(scope="module")
def builds() -> list[dict]:
    """One entry for each build: what it was built for and what it takes."""
    return run_as_program(__file__)


def test_every_variant_builds(builds):
    assert len(builds) == len(KERNELS) * len(SIZES) * len(LAYERS) * len(CAPABILITIES) * len(DTYPES)


def test_nothing_spills(builds):
    for build in builds:
        check_resources(build, REGISTER_LIMIT)


def test_loads_and_stores_are_16_bytes_wide(builds):
    for build in builds:
        assert build["wide_load"], build
        assert build["wide_store"], build


def main() -> None:
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        report = list(pool.map(build, *zip(*product(KERNELS, SIZES, LAYERS, CAPABILITIES, DTYPES))))
    print(json.dumps(report))


def build(name: str, channels: int, layers: int, capability: int, dtype: str) -> dict[str, Any]:
    from dist_reg_kernels import layer_mix, rows

    backward = name == "backward"
    function: Any = layer_mix._layer_mix_backward_kernel if backward else layer_mix._layer_mix_kernel
    blocks, warps = rows.block_and_warps(channels)
    pointers = [argument for argument in function.arg_names if argument.endswith("_ptr")]
    types: dict[str, Any] = dict.fromkeys(pointers, f"*{dtype}")
    types |= dict.fromkeys(("gates_ptr", "dots_ptr", "carried_ptr"), "*fp32")
    types |= dict.fromkeys(("states", "outs"), (f"*{dtype}",) * layers)
    constants = {"STATES": layers, "BLOCKS": blocks, **KERNELS[name]}
    if name == "forward":
        constants["carried_ptr"] = None
    aligned = [argument for argument in function.arg_names if argument in types and argument not in constants]
    found = cross_compile(
        function,
        {name: kind for name, kind in types.items() if name in function.arg_names},
        constants,
        [*aligned, "channels"],
        capability=capability,
        warps=warps,
        fp_fusion=True,
    )
    return {
        "kernel": name,
        "channels": channels,
        "layers": layers,
        "capability": capability,
        "dtype": dtype,
        **found,
    }


if __name__ == "__main__":
    main() if "--json" in sys.argv else None
