"""The noise definition: published vectors, equal integers everywhere, moments."""

import numpy as np
import pytest
import torch
from dist_reg_kernels import philox

# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def numba_bits(counter: list[int], key: list[int]) -> list[int]:
    philox_cpu = pytest.importorskip("dist_reg_kernels.philox_cpu")
    bits = np.zeros(2 * philox_cpu.LANES, np.uint64)
    philox_cpu.fill_bits(bits, *map(np.uint32, counter + key))
    return bits.view(np.uint32)[:4].tolist()


def triton_bits(counter: list[int], key: list[int]) -> list[int]:
    pytest.importorskip("triton")
    from tests.kernels import bits_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = torch.tensor(counter + key, device=device)
    out = torch.full((4,), -1, dtype=torch.int64, device=device)
    bits_kernel.store_bits[(1,)](arguments, out)
    return out.tolist()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter, key, expected):
    got = philox.philox4x32(torch.tensor(words(counter)), tuple(words(key)))
    assert got.tolist() == words(expected)


@pytest.mark.parametrize("bits", [numba_bits, triton_bits])
def test_every_backend_makes_the_published_integers(bits):
    for counter, key, expected in KNOWN:
        assert bits(words(counter), words(key)) == words(expected)


@pytest.mark.parametrize("bits", [numba_bits, triton_bits])
def test_every_backend_makes_the_reference_integers(bits):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        counter = torch.randint(2**32, (4,), generator=generator)
        key = torch.randint(2**32, (2,), generator=generator).tolist()
        expected = philox.philox4x32(counter, (key[0], key[1])).tolist()
        assert bits(counter.tolist(), key) == expected


def test_the_counter_is_block_key_site():
    """Written out once more for a single channel, from the sentence in the module's docstring."""
    key, seed, site, token, channels, channel = -7 << 33 | 5, 2**63 + 9, 2**31 + 3, 3, 10, 6
    noise = philox.noise_reference(
        torch.tensor([key]),
        torch.tensor([[2, 8]]),
        8,
        channels,
        seed=seed,
        site=site,
        distribution="uniform",
    )
    counter = [token * 3 + channel // 4, key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF, site]
    word = philox.philox4x32(torch.tensor(counter), (seed & 0xFFFFFFFF, seed >> 32))[channel % 4].item()
    signed = word - 2**32 if word >= 2**31 else word
    assert noise[0, 2 + token, channel].item() == ((signed >> 8) + 0.5) / 2**23


def test_the_normal_follows_its_formula():
    bits = torch.tensor([[0, 0, 2**32 - 1, 2**32 - 1], [123456789, 3 << 30, 987654321, 1 << 31]])
    noise = philox.from_bits(bits, "normal")
    for row, pair in np.ndindex(2, 2):
        a, b = bits[row, 2 * pair].item(), bits[row, 2 * pair + 1].item()
        within = (b << 2) & 0xFFFFFFFF
        within = (within - 2**32 if within >= 2**31 else within) >> 8
        angle = (b >> 30) * np.pi / 2 + (within + 0.5) / 2**23 * np.pi / 4
        radius = np.sqrt(-2 * np.log(((a >> 9) + 0.5) / 2**23))
        expected = torch.tensor([radius * np.cos(angle), radius * np.sin(angle)]).float()
        got = noise[row, 2 * pair : 2 * pair + 2]
        torch.testing.assert_close(got, expected, rtol=2.0**-23, atol=1e-9)


# Mean, variance, fourth and eighth central moment; the eighth enters a standard error only.
MOMENTS = {"normal": (0, 1, 3, 105), "uniform": (0, 1 / 3, 1 / 5, 1 / 9)}
MOMENTS["uniform_released"] = (1 / 2, 1 / 12, 1 / 80, 1 / 2304)


@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
def test_moments_and_independence_of_neighbours(distribution):
    """Within five standard errors over a quarter of a million draws, along channels, tokens, keys and sites."""
    keys = torch.arange(16)
    spans = torch.tensor([[0, 64]]).expand(16, 2)

    def draw(site: int, seed: int = 1) -> torch.Tensor:
        noise = philox.noise_reference(keys, spans, 64, 256, seed=seed, site=site, distribution=distribution)
        return noise.double()

    noise = draw(site=1)
    mean, variance, fourth, eighth = MOMENTS[distribution]
    count = noise.numel()
    centred = noise - mean
    assert abs(centred.mean()) < 5 * (variance / count) ** 0.5
    assert abs(centred.square().mean() - variance) < 5 * ((fourth - variance**2) / count) ** 0.5
    assert abs(centred.pow(4).mean() - fourth) < 5 * ((eighth - fourth**2) / count) ** 0.5
    pairs = {
        "channels": (centred[..., 1:], centred[..., :-1]),
        "tokens": (centred[:, 1:], centred[:, :-1]),
        "examples": (centred[1:], centred[:-1]),
        "sites": (centred, draw(site=2) - mean),
        "seeds": (centred, draw(site=1, seed=2) - mean),
    }
    for name, (left, right) in pairs.items():
        assert abs((left * right).mean()) < 5 * variance / left.numel() ** 0.5, name


def test_ranges():
    bits = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1])
    assert philox.from_bits(bits, "uniform").abs().max() == 1 - 2.0**-24
    released = philox.from_bits(bits, "uniform_released")
    assert released.min() == 2.0**-24
    assert released.max() == 1 - 2.0**-24


def test_an_unknown_distribution_is_named():
    with pytest.raises(ValueError, match=r"'normal', 'uniform', 'uniform_released'.*got 'gauss'"):
        philox.from_bits(torch.zeros(4, dtype=torch.int64), "gauss")
