"""Every Triton kernel compiles for Ampere and Hopper on a machine without a GPU.

Run in a process of its own, because a process that interprets Triton cannot compile it. As a program it prints the
table of docs/kernels.md: the most registers and shared memory that a variant of each kernel takes.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from typing import Any, NamedTuple

import pytest

from tests.kernels.cross_compile import CAPABILITIES, DTYPES, check_resources, cross_compile, run_as_program

SHORT, LONG = 1024, 8192  # hidden sizes: a row in one piece, and in a loop

Constants = dict[str, Any]


class Kernel(NamedTuple):
    """A kernel of dist_reg_kernels and how it is built, for every dtype and capability."""

    file: str
    function: str
    variants: list[Constants]
    """Constants that change the code, the heaviest first: all at SHORT, the first at LONG as well."""
    registers: int = 64
    """The most that a build may take: with 64, four programs of 256 threads share a multiprocessor."""
    wide_store: bool = True
    fp_fusion: bool = True


def noises(*kinds: tuple[int, bool], **others: Any) -> list[Constants]:
    return [{"DISTRIBUTION": kind, "RELATIVE": relative, **others} for kind, relative in kinds]


# Distribution and whether the scale is relative: every value of both, the costly normal with each.
NORMAL_RELATIVE, NORMAL, UNIFORM, RELEASED_RELATIVE = (0, True), (0, False), (1, False), (2, True)

KERNELS = {
    "perturb": Kernel(
        "perturb",
        "_perturb_kernel",
        noises(NORMAL_RELATIVE, NORMAL, UNIFORM, RELEASED_RELATIVE, FORK=False),
        fp_fusion=False,
    ),
    "fork": Kernel(
        "perturb", "_perturb_kernel", noises(NORMAL_RELATIVE, UNIFORM, FORK=True), fp_fusion=False
    ),
    "stability": Kernel("stability", "_stability_kernel", [{}], wide_store=False),
    "stability_backward": Kernel(
        "stability", "_stability_backward_kernel", [{"DETACH_CLEAN": False}, {"DETACH_CLEAN": True}]
    ),
    "perturb_stability": Kernel(
        "perturb_stability", "_perturb_stability_kernel", noises(NORMAL_RELATIVE, UNIFORM), fp_fusion=False
    ),
}

# Arguments that are neither an index nor a tensor of the stream's dtype.
TYPES = {
    "keys_ptr": "*i64",
    "spans_ptr": "*i32",
    "distance_ptr": "*fp32",
    "upstream_ptr": "*fp32",
    "sigma": "fp32",
}
ALIGNED = ("stride_batch", "stride_token", "channels")


@pytest.fixture(scope="module")
def builds() -> list[dict]:
    """One entry for each build: what it was built for and what it takes."""
    return run_as_program(__file__)


def test_every_variant_builds(builds):
    for name, kernel in KERNELS.items():
        targets = len(CAPABILITIES) * len(DTYPES)
        assert sum(build["kernel"] == name for build in builds) == targets * (len(kernel.variants) + 1)


def test_nothing_spills(builds):
    for build in builds:
        check_resources(build, KERNELS[build["kernel"]].registers)


def test_loads_and_stores_are_16_bytes_wide(builds):
    for build in builds:
        assert build["wide_load"], build
        assert build["wide_store"] or not KERNELS[build["kernel"]].wide_store, build


def main() -> None:
    # Imported once, before the workers fork.
    import_module("dist_reg_kernels.perturb")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        report = list(pool.map(build, *zip(*variants())))
    if "--json" in sys.argv:
        print(json.dumps(report))
        return
    for name, capability in itertools.product(KERNELS, CAPABILITIES):
        built = [one for one in report if (one["kernel"], one["capability"]) == (name, capability)]
        most = {key: max(one[key] for one in built) for key in ("registers", "stack", "shared")}
        print(f"| `{name}` | sm_{capability} | {' | '.join(map(str, most.values()))} |")


def variants() -> Iterator[tuple[str, int, str, int, Constants]]:
    for name, kernel in KERNELS.items():
        sizes = [(SHORT, variant) for variant in kernel.variants] + [(LONG, kernel.variants[0])]
        for (channels, variant), capability, dtype in itertools.product(sizes, CAPABILITIES, DTYPES):
            yield name, capability, dtype, channels, variant


def build(name: str, capability: int, dtype: str, channels: int, variant: Constants) -> dict:
    from dist_reg_kernels import rows

    kernel = KERNELS[name]
    function = getattr(import_module(f"dist_reg_kernels.{kernel.file}"), kernel.function)
    blocks, warps = rows.block_and_warps(channels)
    names = function.arg_names
    given = {"stride_channel": 1, "HAS_SPANS": True, "BLOCKS": blocks, **variant}
    pointers = [name for name in names if name.endswith("_ptr")]
    return {
        "kernel": name,
        "capability": capability,
        "dtype": dtype,
        "channels": channels,
        "variant": variant,
        **cross_compile(
            function,
            dict.fromkeys(pointers, f"*{dtype}") | TYPES,
            {name: value for name, value in given.items() if name in names},
            [*pointers, *(name for name in ALIGNED if name in names)],
            capability=capability,
            warps=warps,
            fp_fusion=kernel.fp_fusion,
        ),
    }


if __name__ == "__main__":
    main()
