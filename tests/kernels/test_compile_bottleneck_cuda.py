"""The kernels of bottleneck compile for Ampere and Hopper without a GPU, without spills."""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import pytest

from tests.kernels.cross_compile import CAPABILITIES, DTYPES, check_resources, cross_compile, run_as_program

SIZES = (1024, 688, 352)  # D, d, h; the launcher pads 683 and 342 to these
REGISTER_LIMIT = 255
SHARED_MEMORY_LIMIT = 80 * 1024  # two programs share a multiprocessor of sm_80
CHOICES = 2

KERNELS = {
    "outer encoder": {"GATHER": True, "BY_CHOICE": False, "DROP": True},
    "inner encoder": {"GATHER": False, "BY_CHOICE": True, "DROP": True},
    "decoder": {"EVERY": True, "ERROR": True},
    "error": {"EVERY": True},
    "back through decoder": {"DECODER": True, "BY_CHOICE": False, "GATHER": True},
    "back through inner": {"DECODER": False, "BY_CHOICE": True, "GATHER": False},
    "hidden": {"EVERY": True},
    "weight": {"LEFT_GATHER": False, "RIGHT_GATHER": True, "BY_CHOICE": False},
    "inner weight": {"LEFT_GATHER": False, "RIGHT_GATHER": False, "BY_CHOICE": True},
}

# Pointers to tensors of the stream; the others are of the weights' dtype.
STREAMS = {
    "outer encoder": ("rows_ptr",),
    "decoder": ("hidden_ptr", "out_ptr"),
    "error": ("hidden_ptr", "gradient_ptr"),
    "back through decoder": ("rows_ptr",),
    "hidden": ("out_ptr",),
    "weight": ("right_ptr",),
}
PAIRS = [*((dtype, dtype) for dtype in DTYPES), ("bf16", "fp32")]  # of stream and weights


@pytest.fixture(scope="module")
def builds() -> list[dict]:
    """One entry for each build: what it was built for and what it takes."""
    return run_as_program(__file__)


def test_every_variant_builds(builds):
    assert len(builds) == len(KERNELS) * len(CAPABILITIES) * len(PAIRS)


def test_nothing_spills(builds):
    for build in builds:
        check_resources(build, REGISTER_LIMIT, SHARED_MEMORY_LIMIT)


def test_loads_are_16_bytes_wide(builds):
    for build in builds:
        assert build["wide_load"] or build["wide_copy"], build


def main() -> None:
    wanted = list(product(KERNELS, CAPABILITIES, PAIRS))
    from dist_reg_kernels import bottleneck  # noqa: F401  imported once, before the workers fork

    with ProcessPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        report = list(pool.map(build, *zip(*wanted)))
    if "--json" in sys.argv:
        print(json.dumps(report))
        return
    for one in report:
        figures = [one[key] for key in ("registers", "stack", "shared", "wide_load", "wide_copy")]
        print(one["kernel"], one["capability"], *one["dtypes"], *figures, sep=" | ")


def build(name: str, capability: int, dtypes: tuple[str, str]) -> dict:
    from dist_reg_kernels import bottleneck_tiles, bottleneck_weights

    kernel, columns, depth = kernel_of(name)
    stream, dtype = dtypes
    wide = dtype == "fp32"
    names = kernel.arg_names
    if "weight" in name:
        tile = bottleneck_weights.tile_of(depth, columns, wide)
    else:
        tile = {"ROWS": bottleneck_tiles.rows_of_tile(wide), **bottleneck_tiles.blocks(columns, depth, wide)}
    constants = {
        **KERNELS[name],
        **tile,
        "WIDE": wide,
        "CHOICES": CHOICES,
        "GROUPS": CHOICES if KERNELS[name].get("BY_CHOICE") else CHOICES + 1,
        "TAKEN": True,
        "DROP": KERNELS[name].get("DROP", True),
    }
    constants = {key: value for key, value in constants.items() if key in names}
    sizes = ("decoded", "channels", "columns", "depth", "width", "height")
    aligned = [one for one in names if one.endswith(("_ptr", "_stride")) and one != "bounds_ptr"]
    aligned += [one for one in names if one in sizes]
    return {
        "kernel": name,
        "capability": capability,
        "dtypes": dtypes,
        **cross_compile(
            kernel,
            {one: type_of(one, stream if one in STREAMS.get(name, ()) else dtype) for one in names},
            constants,
            aligned,
            capability=capability,
            warps=4,
            fp_fusion=True,
        ),
    }


def kernel_of(name: str) -> tuple[Any, int, int]:
    """The kernel, and the columns and the depth of its product, or the columns and the rows of a weight."""
    from dist_reg_kernels import bottleneck_backward, bottleneck_triton, bottleneck_weights

    channels, width, thin = SIZES
    return {
        "outer encoder": (bottleneck_triton._layer_kernel, width, channels),
        "inner encoder": (bottleneck_triton._layer_kernel, thin, width),
        "decoder": (bottleneck_triton._decoder_kernel, channels, width),
        "error": (bottleneck_backward._error_kernel, channels, width),
        "back through decoder": (bottleneck_backward._pull_kernel, width, channels),
        "back through inner": (bottleneck_backward._pull_kernel, width, thin),
        "hidden": (bottleneck_backward._hidden_kernel, channels, width),
        "weight": (bottleneck_weights._weight_kernel, channels, width),
        "inner weight": (bottleneck_weights._weight_kernel, width, thin),
    }[name]


def type_of(name: str, dtype: str) -> str:
    """Tensors are of `dtype`, errors fp32."""
    if name in ("limit", "scale", "factor"):
        return "fp32"
    if name in ("order_ptr", "views_ptr", "keys_ptr"):
        return "*i64"
    if name == "bounds_ptr":
        return "*i32"
    if name in ("error_ptr", "upstream_ptr"):
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"


if __name__ == "__main__":
    main()
