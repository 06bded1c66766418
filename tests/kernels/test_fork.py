"""fork's fast paths: the clean half is the stream, the noisy half is perturb's, bit for bit."""

import pytest
import torch
from dist_reg_kernels.fork import fork_torch
from dist_reg_kernels.perturb import perturb_torch

from tests.kernels.test_perturb import batch, options

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 63), (1, 2, 4096)], ids=str)
def test_the_halves_are_the_stream_and_perturb(backend, shape, dtype, relative):
    hidden, keys = batch(shape, dtype, backend.device)
    twin = backend.operation("fork")(hidden, keys, None, *options(0.1, relative=relative))
    clean, noisy = twin.chunk(2)
    assert twin.dtype == dtype
    assert torch.equal(clean, hidden)
    assert torch.equal(noisy, backend.run(hidden, keys, None, *options(0.1, relative=relative)))


def test_the_reference_forks_too():
    hidden, keys = batch((2, 3, 10))
    clean, noisy = fork_torch(hidden, keys, None, *options()).chunk(2)
    assert torch.equal(clean, hidden)
    assert torch.equal(noisy, perturb_torch(hidden, keys, None, *options()))


@pytest.mark.usefixtures("poisoned")
def test_padding_and_other_strides(backend):
    hidden, keys = batch((3, 4, 10), device=backend.device)
    hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    spans = torch.tensor([[1, 3], [0, 0], [0, 4]], device=backend.device)
    clean, noisy = backend.operation("fork")(hidden, keys, spans, *options()).chunk(2)
    assert torch.equal(clean, hidden)
    assert torch.equal(noisy, backend.run(hidden, keys, spans, *options()))
    assert torch.equal(noisy[1], hidden[1])


def test_empty_batches(backend):
    keys = torch.empty(0, dtype=torch.int64, device=backend.device)
    nothing = torch.empty(0, 3, 8, device=backend.device)
    assert backend.operation("fork")(nothing, keys, None, *options()).shape == (0, 3, 8)
