"""perturb's fast paths against the reference beside them."""

import threading
import warnings

import pytest
import torch
from dist_reg_kernels import philox
from dist_reg_kernels.perturb import perturb_reference, perturb_torch

SEED, SITE = 2**63 + 12345678901, 2**31 + 5
SHAPES = [(1, 1, 1), (1, 3, 63), (2, 4, 100), (1, 2, 4096)]
HALF_PRECISION = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def batch(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    hidden = torch.randn(shape, generator=generator).to(device, dtype)
    keys = torch.randint(-(2**63), 2**63 - 1, shape[:1], generator=generator).to(device)
    return hidden, keys


def options(sigma=1.0, distribution="normal", relative=False):
    return SEED, SITE, sigma, distribution, relative


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
def test_the_noise_is_the_reference_noise(backend, shape, distribution):
    _, keys = batch(shape, device=backend.device)
    zeros = torch.zeros(shape, device=backend.device)
    got = backend.run(zeros, keys, None, *options(distribution=distribution))
    expected = perturb_torch(zeros, keys, None, *options(distribution=distribution))
    if distribution == "normal":
        assert (got - expected).abs().max() <= 1e-6
    else:
        assert torch.equal(got, expected)


def test_a_million_normals_stay_within_the_bound():
    perturb_cpu = pytest.importorskip("dist_reg_kernels.perturb_cpu").perturb_cpu
    keys = torch.arange(64)
    zeros = torch.zeros(64, 64, 256)
    got = perturb_cpu(zeros, keys, None, *options())
    expected = perturb_torch(zeros, keys, None, *options())
    assert (got - expected).abs().max() <= 1e-6


def test_the_largest_normals_stay_within_the_bound():
    """The 4096 largest radii, |z| from 3.9 to 5.8, each at ten angles."""
    philox_cpu = pytest.importorskip("dist_reg_kernels.philox_cpu")
    radius_bits = (torch.arange(4096) << 9).repeat(10)
    angle_bits = torch.randint(2**32, radius_bits.shape, generator=torch.Generator().manual_seed(0))
    expected = philox.from_bits(torch.stack((radius_bits, angle_bits), dim=-1), "normal")
    pairs = zip(radius_bits.numpy().astype("uint32"), angle_bits.numpy().astype("uint32"))
    got = torch.tensor([philox_cpu.normal_pair(*pair) for pair in pairs])
    assert expected.abs().max() > 5.5
    assert (got - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_fp32_sum(backend, distribution, relative):
    hidden, keys = batch((2, 4, 100), device=backend.device)
    settings = options(0.1, distribution, relative)
    got = backend.run(hidden, keys, None, *settings)
    expected = perturb_torch(hidden, keys, None, *settings)
    if distribution == "uniform" and not relative:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=2.0**-22, atol=2e-7)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("dtype", HALF_PRECISION, ids=str)
def test_half_precision_error_budget(backend, dtype, relative):
    hidden, keys = batch((2, 4, 100), dtype, backend.device)
    spans = torch.tensor([[0, 4]] * 2, device=backend.device)
    noise = philox.noise_reference(keys, spans, 4, 100, seed=SEED, site=SITE, distribution="normal")
    exact = perturb_reference(hidden.float(), noise, sigma=0.1, relative=relative)
    eager = perturb_reference(hidden, noise.to(dtype), sigma=0.1, relative=relative)
    got = backend.run(hidden, keys, None, *options(0.1, relative=relative))
    ulp = HALF_PRECISION[dtype] * exact.abs()
    assert ((got - exact).abs() <= 2 * (eager.float() - exact).abs().max() + ulp).all()


def test_bf16_rounds_to_nearest_even_and_keeps_nan_and_infinity():
    perturb_cpu = pytest.importorskip("dist_reg_kernels.perturb_cpu").perturb_cpu
    hidden, keys = batch((4, 16, 100), torch.bfloat16)
    hidden[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.3e38])
    # A NaN whose payload sits in the low bits only, which a plain rounding would carry into infinity.
    hidden[0, 1, 0] = torch.tensor(0x7F81, dtype=torch.int16).view(torch.bfloat16)
    settings = options(1.0, "uniform")
    expected = perturb_torch(hidden, keys, None, *settings)
    assert torch.equal(perturb_cpu(hidden, keys, None, *settings).nan_to_num(7.0), expected.nan_to_num(7.0))


def test_float64_takes_the_sum_in_float64():
    perturb_cpu = pytest.importorskip("dist_reg_kernels.perturb_cpu").perturb_cpu
    hidden, keys = batch((2, 4, 100), torch.float64)
    settings = options(1e-5, "uniform")
    assert torch.equal(
        perturb_cpu(hidden, keys, None, *settings), perturb_torch(hidden, keys, None, *settings)
    )


@pytest.mark.parametrize(
    "layout",
    [
        lambda hidden: hidden.transpose(0, 1).contiguous().transpose(0, 1),
        lambda hidden: hidden.transpose(1, 2).contiguous().transpose(1, 2),
        lambda hidden: torch.cat((hidden, hidden), dim=-1)[..., : hidden.shape[-1]],
        lambda hidden: hidden[:1].expand_as(hidden),
    ],
    ids=["tokens-first", "channels-first", "slice", "expanded"],
)
def test_non_contiguous_input(backend, layout):
    hidden, keys = batch((2, 4, 100), device=backend.device)
    hidden = layout(hidden)
    got = backend.run(hidden, keys, None, *options())
    assert got.is_contiguous()
    assert torch.equal(got, backend.run(hidden.contiguous(), keys, None, *options()))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_tokens_outside_the_span_are_copied(backend, integers):
    hidden, keys = batch((3, 4, 10), device=backend.device)
    hidden[0, 0] = float("inf")
    spans = torch.tensor([[1, 3], [0, 0], [0, 4]], dtype=integers, device=backend.device)
    inside = philox.inside_spans(spans, 4)
    for relative in (False, True):
        settings = options(relative=relative)
        got = backend.run(hidden, keys, spans, *settings)
        assert torch.equal(got[~inside], hidden[~inside])
        assert (got[inside] != hidden[inside]).all()
        assert torch.equal(perturb_torch(hidden, keys, spans, *settings)[~inside], hidden[~inside])


def test_padding_side_does_not_change_the_noise(backend):
    device = backend.device
    keys = torch.tensor([11, -12], device=device)
    zeros = torch.zeros(2, 5, 63, device=device)
    right = backend.run(zeros, keys, torch.tensor([[0, 3], [0, 2]], device=device), *options())
    left = backend.run(zeros, keys, torch.tensor([[2, 5], [3, 5]], device=device), *options())
    assert torch.equal(right[0, :3], left[0, 2:])
    assert torch.equal(right[1, :2], left[1, 3:])


def test_batch_order_does_not_change_the_noise(backend):
    hidden, keys = batch((3, 2, 20), device=backend.device)
    order = torch.tensor([2, 0, 1], device=backend.device)
    whole = backend.run(hidden, keys, None, *options())
    assert torch.equal(backend.run(hidden[order], keys[order], None, *options()), whole[order])
    assert torch.equal(backend.run(hidden[1:2], keys[1:2], None, *options()), whole[1:2])


def test_seed_site_and_key_each_change_the_noise(backend):
    hidden, keys = batch((1, 1, 64), device=backend.device)
    settings = [
        (keys, SEED, SITE),
        (keys, SEED ^ 1, SITE),
        (keys, SEED ^ 1 << 40, SITE),
        (keys, SEED, SITE ^ 1),
        (keys ^ 1, SEED, SITE),
        (keys ^ (1 << 40), SEED, SITE),
    ]
    results = [backend.run(hidden, k, None, seed, site, 1.0, "normal", False) for k, seed, site in settings]
    for i, left in enumerate(results):
        for right in results[:i]:
            assert (left != right).float().mean() > 0.9


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_the_block_size_does_not_change_the_result(backend, monkeypatch, relative):
    if backend.name != "triton":
        pytest.skip("only the Triton kernel has blocks")
    from dist_reg_kernels import rows

    hidden, keys = batch((1, 2, 300), device=backend.device)
    whole = backend.run(hidden, keys, None, *options(relative=relative))
    monkeypatch.setattr(rows, "block_and_warps", lambda channels: (16, 1))
    parts = backend.run(hidden, keys, None, *options(relative=relative))
    if relative:
        torch.testing.assert_close(parts, whole, rtol=2.0**-21, atol=1e-6)
    else:
        assert torch.equal(parts, whole)


@pytest.mark.usefixtures("poisoned")
def test_every_element_is_written(backend):
    hidden, keys = batch((2, 3, 63), device=backend.device)
    spans = torch.tensor([[0, 3], [1, 2]], device=backend.device)
    assert not backend.run(hidden, keys, spans, *options()).isnan().any()


def test_empty_batches(backend):
    keys = torch.empty(0, dtype=torch.int64, device=backend.device)
    assert backend.run(torch.empty(0, 3, 8, device=backend.device), keys, None, *options()).shape == (0, 3, 8)


def test_input_is_left_alone(backend):
    hidden, keys = batch((1, 2, 16), device=backend.device)
    before = hidden.clone()
    backend.run(hidden, keys, None, *options())
    assert torch.equal(hidden, before)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_the_thread_count_does_not_change_the_result(relative):
    perturb_cpu = pytest.importorskip("dist_reg_kernels.perturb_cpu").perturb_cpu
    hidden, keys = batch((7, 50, 385))
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(perturb_cpu(hidden, keys, None, *options(0.1, relative=relative)))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.usefixtures("restore_threads")
def test_two_python_threads_at_once():
    perturb_cpu = pytest.importorskip("dist_reg_kernels.perturb_cpu").perturb_cpu
    torch.set_num_threads(2)
    hidden, keys = batch((8, 64, 256))
    expected = perturb_cpu(hidden, keys, None, *options())
    equal = []

    def work():
        for _ in range(20):
            equal.append(torch.equal(perturb_cpu(hidden, keys, None, *options()), expected))

    callers = [threading.Thread(target=work) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert equal == [True] * 40


@pytest.mark.usefixtures("restore_threads")
def test_a_forked_child_computes_too():
    """As a DataLoader worker does, after the parent has started its threads."""
    import multiprocessing

    perturb_cpu = pytest.importorskip("dist_reg_kernels.perturb_cpu").perturb_cpu
    torch.set_num_threads(2)
    hidden, keys = batch((8, 64, 256))
    expected = perturb_cpu(hidden, keys, None, *options())
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child():
        # torch's own OpenMP threads do not survive the fork, so NumPy compares.
        answers.put(bool((perturb_cpu(hidden, keys, None, *options()).numpy() == expected.numpy()).all()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=child, daemon=True)
        process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert answers.get()
