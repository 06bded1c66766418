"""The public operation: gradient, compilation, checkpointing, backends, errors."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dist_reg import noise, ops
from dist_reg.errors import UserError
from dist_reg.ops import backend as backend_module

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
on_devices = pytest.mark.parametrize("device", DEVICES)


def inputs(device="cpu", dtype=torch.float32, shape=(2, 5, 36)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(device, dtype)
    keys = noise.example_keys(torch.arange(shape[0], device=device), epoch=0)
    spans = torch.tensor([[0, 5], [2, 4]], dtype=torch.int32, device=device)
    return hidden, keys, spans


def perturbed(hidden, keys, spans=None, *, sigma=0.1, site=7, **options):
    return ops.perturb(hidden, sigma=sigma, seed=42, example_keys=keys, site=site, spans=spans, **options)


@on_devices
@pytest.mark.parametrize("scale", ops.SCALES)
def test_the_gradient_is_the_upstream_gradient(device, scale):
    hidden, keys, spans = inputs(device)
    hidden.requires_grad_()
    upstream = torch.randn_like(hidden)
    perturbed(hidden, keys, spans, scale=scale).backward(upstream)
    assert torch.equal(hidden.grad, upstream)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spans", [True, False], ids=["spans", "no-spans"])
def test_opcheck(device, dtype, spans):
    hidden, keys, span = inputs(device, dtype)
    hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    arguments = (hidden, keys, span if spans else None, -5, 2**32 - 1, 0.1, "normal", True)
    torch.library.opcheck(torch.ops.dist_reg.perturb, arguments)


@on_devices
def test_compiles_without_a_graph_break(device):
    hidden, keys, spans = inputs(device)

    def layer(hidden, keys, spans, site):
        return perturbed(hidden * 2, keys, spans, site=site) * 3

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for site in (1, 2, 2**32 - 1):
        left, right = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        got, expected = compiled(left, keys, spans, site), layer(right, keys, spans, site)
        assert torch.equal(got, expected)
        got.sum().backward()
        expected.sum().backward()
        assert torch.equal(left.grad, right.grad)


@on_devices
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_replays_the_noise(device, reentrant):
    """The square makes the gradient depend on the noise: another draw in the recomputation would show."""
    hidden, keys, spans = inputs(device)

    def layer(hidden):
        return perturbed(hidden, keys, spans).square()

    plain, saved = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    layer(plain).sum().backward()
    checkpoint(layer, saved, use_reentrant=reentrant).sum().backward()
    assert torch.equal(plain.grad, saved.grad)


@on_devices
@pytest.mark.parametrize("distribution", ops.DISTRIBUTIONS)
def test_the_default_backend_agrees_with_the_reference(device, distribution, monkeypatch):
    hidden, keys, spans = inputs(device)
    got = perturbed(hidden, keys, spans, sigma=1.0, distribution=distribution)
    monkeypatch.setenv("DIST_REG_KERNELS", "reference")
    expected = perturbed(hidden, keys, spans, sigma=1.0, distribution=distribution)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_seeds_are_64_bit_signed_or_not():
    hidden, keys, _ = inputs()
    same = [ops.perturb(hidden, sigma=1.0, seed=s, example_keys=keys, site=0) for s in (2**64 - 3, -3)]
    assert torch.equal(*same)
    other = ops.perturb(hidden, sigma=1.0, seed=2**32 - 3, example_keys=keys, site=0)
    assert not torch.equal(other, same[0])


def test_sigma_zero_changes_nothing():
    hidden, keys, spans = inputs()
    assert torch.equal(perturbed(hidden, keys, spans, sigma=0.0), hidden)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_environment_forces_a_backend(backend, monkeypatch):
    hidden, keys, spans = inputs()
    asked = []
    load = backend_module._load
    monkeypatch.setattr(backend_module, "_load", lambda *names: asked.append(names[-1]) or load(*names))
    monkeypatch.setenv("DIST_REG_KERNELS", backend)
    perturbed(hidden, keys, spans)
    assert asked == [backend]


def test_a_misspelt_backend_is_an_error(monkeypatch):
    hidden, keys, _ = inputs()
    monkeypatch.setenv("DIST_REG_KERNELS", "tritn")
    with pytest.raises(UserError, match="DIST_REG_KERNELS='tritn': did you mean 'triton'"):
        perturbed(hidden, keys)


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    hidden, keys, _ = inputs()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("DIST_REG_KERNELS", "triton")
    with pytest.raises(UserError, match="needs CUDA tensors, got cpu.*TRITON_INTERPRET=1"):
        perturbed(hidden, keys)


FORCED_TRITON = """
import triton, triton.language, os, torch
os.environ.update(TRITON_INTERPRET="1", DIST_REG_KERNELS="triton")
from dist_reg import ops
def draw():
    return ops.perturb(torch.zeros(1, 2, 9), sigma=1.0, seed=1, example_keys=torch.tensor([3]), site=2, scale=SCALE)
got = draw()
os.environ["DIST_REG_KERNELS"] = "reference"
assert (got - draw()).abs().max() <= 1e-6
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    setup = f"import sys; sys.path[:] = {sys.path!r}\n"
    return subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("scale", ops.SCALES)
def test_the_interpreter_works_when_triton_was_imported_before_it_was_asked_for(scale):
    pytest.importorskip("triton")
    done = run_python(FORCED_TRITON.replace("SCALE", repr(scale)))
    assert done.returncode == 0, done.stderr[-2000:]


MISSING = """
import sys, os, warnings
sys.modules["numba"] = None
sys.modules["triton"] = None
import torch
from dist_reg import ops
os.environ["TRITON_INTERPRET"] = "1"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for backend in ("cpu", "cpu", "triton", "triton"):
        os.environ["DIST_REG_KERNELS"] = backend
        ops.perturb(torch.zeros(1, 2, 9), sigma=1.0, seed=1, example_keys=torch.tensor([3]), site=2)
print([str(w.message).split(" ")[0] for w in caught if "reference" in str(w.message)])
"""


def test_without_numba_and_triton_one_warning_each_and_the_reference():
    done = run_python(MISSING)
    assert done.stdout.strip() == "['numba>=0.62', 'triton>=3.6']", done.stderr[-2000:]


READ_ONLY = """
import numba, torch
compile = numba.njit
def njit(*arguments, **options):
    if options.get("cache"):
        raise RuntimeError("cannot cache function: no locator available")  # as Numba puts it
    return compile(*arguments, **options)
numba.njit = njit
from dist_reg import ops
ops.perturb(torch.zeros(1, 2, 9), sigma=1.0, seed=1, example_keys=torch.tensor([3]), site=2)
"""


def test_without_a_writable_cache_the_kernel_compiles_all_the_same():
    pytest.importorskip("numba")
    done = run_python(READ_ONLY)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_operations_imports_no_kernel():
    done = run_python(
        "import dist_reg.ops; print([m for m in ('triton', 'numba', 'dist_reg_kernels') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_states": torch.zeros(5, 36)},
            r"hidden_states must be \[batch, tokens, channels\].*\[5, 36\]",
        ),
        (
            {"hidden_states": torch.zeros(2, 5, 36, dtype=torch.int64)},
            r"hidden_states must be float32.*int64",
        ),
        (
            {"example_keys": torch.zeros(3, dtype=torch.int64)},
            r"example_keys must be int64 \[batch\] = \[2\].*\[3\]",
        ),
        ({"example_keys": torch.zeros(2)}, r"example_keys must be int64.*float32"),
        (
            {"example_keys": torch.zeros(2, dtype=torch.int64, device="meta")},
            "example_keys must be on cpu.*meta",
        ),
        (
            {"spans": torch.zeros(2, 5, dtype=torch.int32)},
            r"spans must be int32 or int64 \[batch, 2\] = \[2, 2\]",
        ),
        ({"spans": torch.zeros(2, 2)}, r"spans must be int32 or int64.*float32"),
        ({"spans": torch.zeros(2, 2, dtype=torch.int32, device="meta")}, "spans must be on cpu.*meta"),
        ({"sigma": -1.0}, "sigma must be a finite number not below 0, got -1.0"),
        ({"sigma": float("nan")}, "sigma must be a finite number not below 0, got nan"),
        ({"distribution": "nomal"}, "unknown distribution 'nomal': did you mean 'normal'"),
        ({"scale": "relativ"}, "unknown scale 'relativ': did you mean 'relative'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument_and_what_was_expected(change, message):
    hidden, keys, spans = inputs()
    arguments = {
        "hidden_states": hidden,
        "example_keys": keys,
        "spans": spans,
        "sigma": 0.1,
        "seed": 1,
        "site": 1,
    }
    with pytest.raises(ValueError, match=message):
        ops.perturb(**(arguments | change))


def test_who_counts_operators_sees_it_and_gets_the_same_numbers():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    hidden, keys, spans = inputs()
    alone = perturbed(hidden, keys, spans)
    with Record():
        watched = perturbed(hidden, keys, spans)
    assert "dist_reg.perturb.default" in seen
    assert torch.equal(alone, watched)
