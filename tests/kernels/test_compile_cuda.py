"""The Triton kernel compiles for Ampere and Hopper on a machine without a GPU.

Run in a process of its own, because a process that interprets Triton cannot compile it.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

DTYPES = ("fp32", "bf16", "fp16")
CAPABILITIES = (80, 90)
CHANNELS = 1024
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
    assert len(builds) == len(CAPABILITIES) * len(DTYPES) * 3 * 2


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
    report = [build(*variant) for variant in itertools.product(CAPABILITIES, DTYPES, range(3), (False, True))]
    print(json.dumps(report))


def build(capability: int, dtype: str, distribution: int, relative: bool) -> dict:
    import triton
    from dist_reg_kernels import perturb, rows
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    blocks, warps = rows.block_and_warps(CHANNELS)
    constants = {
        "stride_channel": 1,
        "FORK": False,
        "DISTRIBUTION": distribution,
        "RELATIVE": relative,
        "HAS_SPANS": True,
        "BLOCKS": blocks,
    }
    types = {
        "hidden_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        "keys_ptr": "*i64",
        "spans_ptr": "*i32",
        "sigma": "fp32",
    }
    names = perturb._perturb_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = ("hidden_ptr", "out_ptr", "keys_ptr", "spans_ptr", "stride_batch", "stride_token", "channels")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(perturb._perturb_kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    text = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    return {
        "capability": capability,
        "dtype": dtype,
        "distribution": distribution,
        "relative": relative,
        "warps": warps,
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
