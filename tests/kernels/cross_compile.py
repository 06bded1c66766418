"""Compile Triton kernels for Ampere and Hopper on a machine without a GPU, and read what they take.

A process that interprets Triton cannot compile it, so a test file runs itself as a program.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import pytest

DTYPES = ("fp32", "bf16", "fp16")
CAPABILITIES = (80, 90)
SHARED_MEMORY_LIMIT = 16 * 1024


def run_as_program(file: str) -> list[dict]:
    """What `file`, run in a process that does not interpret Triton, printed as JSON in its last line."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, file, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def cross_compile(
    kernel: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    aligned: Iterable[str],
    *,
    capability: int,
    warps: int,
    fp_fusion: bool,
) -> dict[str, Any]:
    """Shared memory, registers, stack and width of the accesses of one build.

    Arguments in neither `types` nor `constants` are int32; the `aligned` ones are multiples of 16 (bytes, for pointers).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs=constants,
            attrs={
                path: [["tt.divisibility", 16]] for name in aligned for path in _paths(names, name, types)
            },
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": fp_fusion},
    )
    registers, stack = _resources(compiled.asm["cubin"])
    return {
        "shared": compiled.metadata.shared,
        "registers": registers,
        "stack": stack,
        "wide_load": "ld.global.v4.b32" in compiled.asm["ptx"],
        "wide_copy": bool(re.search(r"cp\.async\.c[ag]\.shared\.global.*0x10", compiled.asm["ptx"])),
        "wide_store": "st.global.v4.b32" in compiled.asm["ptx"],
    }


def _paths(names: list[str], name: str, types: dict[str, Any]) -> list[tuple[int, ...]]:
    """Where the argument `name` lies, or each of its parts where it is a tuple."""
    place, kind = names.index(name), types.get(name)
    return [(place, part) for part in range(len(kind))] if isinstance(kind, tuple) else [(place,)]


def check_resources(build: dict[str, Any], registers: int, shared: int = SHARED_MEMORY_LIMIT) -> None:
    """At most `shared` bytes of shared memory, no spilled registers, at most `registers` of them."""
    assert build["shared"] <= shared, build
    if build["registers"] is not None:  # this Triton ships the tool that reads them
        assert build["stack"] == 0, build
        assert build["registers"] <= registers, build


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
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
