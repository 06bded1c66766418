"""Example keys, token spans and site numbers."""

import pytest
import torch

from dist_reg import noise, ops


def splitmix64(value: int) -> int:
    """The published finaliser in plain integers."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) % 2**64
    return value ^ value >> 31


def test_mix64_is_the_published_finaliser():
    values = [0, 1, 12345, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
    signed = torch.tensor([value - 2**64 if value >= 2**63 else value for value in values])
    assert [value % 2**64 for value in noise.mix64(signed).tolist()] == [splitmix64(v) for v in values]
    # The first output of splitmix64 seeded with 0.
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_example_keys_differ_by_example_and_epoch_and_repeat():
    ids = torch.arange(1000)
    epochs = [noise.example_keys(ids, epoch) for epoch in range(3)]
    assert torch.cat(epochs).unique().numel() == 3000
    assert torch.equal(noise.example_keys(ids, 1), epochs[1])
    assert noise.example_keys(ids.to(torch.int32), 1).dtype == torch.int64
    assert torch.equal(noise.example_keys(ids[5:7], 2), epochs[2][5:7])


def test_example_keys_are_pinned():
    """A changed hash would silently change the noise of a resumed run."""
    assert noise.example_keys(torch.tensor([0, 1]), 0).tolist() == PINNED


PINNED = [-6411193824288604561, 6791897765849424158]


def test_neighbouring_ids_flip_about_half_of_the_bits():
    keys = noise.example_keys(torch.arange(4096), 0)
    flipped = keys[1:] ^ keys[:-1]
    share = torch.stack([(flipped >> bit & 1).double().mean() for bit in range(64)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / 4095**0.5


def test_drawn_keys_follow_the_global_generator():
    torch.manual_seed(3)
    first, second = noise.draw_example_keys(4, "cpu"), noise.draw_example_keys(4, "cpu")
    torch.manual_seed(3)
    again = noise.draw_example_keys(4, "cpu")
    torch.manual_seed(3)
    other_rank = noise.draw_example_keys(4, "cpu", rank=1)
    assert torch.equal(first, again)
    assert first.dtype == torch.int64
    assert torch.cat((first, second, other_rank)).unique().numel() == 12


def test_a_draw_takes_one_number_whatever_the_batch():
    torch.manual_seed(3)
    noise.draw_example_keys(1, "cpu")
    state = torch.get_rng_state()
    torch.manual_seed(3)
    noise.draw_example_keys(64, "cpu")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_token_spans(dtype):
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).to(dtype)
    spans = noise.token_spans(mask, 5, 4, "cpu")
    assert spans.dtype == torch.int32
    assert spans.tolist() == [[0, 3], [2, 4], [1, 4], [0, 0], [0, 4]]


def test_token_spans_without_a_mask_or_with_a_wrong_one():
    assert noise.token_spans(None, 2, 7, "cpu").tolist() == [[0, 7], [0, 7]]
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[batch, tokens\] = \[2, 7\], got \[2, 1, 7, 7\]"
    ):
        noise.token_spans(torch.ones(2, 1, 7, 7), 2, 7, "cpu")


def test_site_ids_are_distinct_and_fit():
    assert noise.site_id(0, 0, 0) == 0
    assert noise.site_id(255, 255, 65535) == 2**32 - 1
    sites = {noise.site_id(m, p, l) for m in range(4) for p in range(4) for l in range(50)}
    assert len(sites) == 800


@pytest.mark.parametrize(
    ("parts", "name"), [((256, 0, 0), "method"), ((0, -1, 0), "point"), ((0, 0, 65536), "layer")]
)
def test_a_site_part_that_does_not_fit_is_named(parts, name):
    with pytest.raises(ValueError, match=f"{name} must be from 0 to"):
        noise.site_id(*parts)


# Mean, and the second, fourth, sixth and eighth central moment; the odd ones are 0.
MOMENTS = {
    "normal": (0, 1, 3, 15, 105),
    "uniform": (0, 1 / 3, 1 / 5, 1 / 7, 1 / 9),
    "uniform_released": (1 / 2, 1 / 12, 1 / 80, 1 / 448, 1 / 2304),
}


@pytest.mark.parametrize("distribution", ops.DISTRIBUTIONS)
def test_statistics_of_the_noise_that_a_model_takes(distribution):
    """On the default path, with hashed keys and real sites: within five standard errors of independent draws."""
    examples, tokens, channels = 16, 64, 256

    def draw(epoch: int = 0, layer: int = 3) -> torch.Tensor:
        drawn = ops.perturb(
            torch.zeros(examples, tokens, channels),
            sigma=1.0,
            seed=0,
            example_keys=noise.example_keys(torch.arange(examples), epoch),
            site=noise.site_id(1, 0, layer),
            distribution=distribution,
        )
        return drawn.double() - mean

    mean, m2, m4, m6, m8 = MOMENTS[distribution]
    x = draw()
    root_count = x.numel() ** 0.5
    assert abs(x.mean()) < 5 * m2**0.5 / root_count
    assert abs(x.square().mean() - m2) < 5 * (m4 - m2**2) ** 0.5 / root_count
    assert abs(x.pow(3).mean()) < 5 * m6**0.5 / root_count

    # The kurtosis by the delta method; 24 / count for the normal.
    kurtosis = m4 / m2**2
    variance = m8 / m2**4 - kurtosis**2 - 4 * kurtosis * (m6 / m2**3 - kurtosis)
    variance += 4 * kurtosis**2 * (kurtosis - 1)
    assert abs(x.pow(4).mean() / x.square().mean() ** 2 - kurtosis) < 5 * variance**0.5 / root_count

    neighbours = {
        **{f"channels, {lag} apart": (x[..., lag:], x[..., :-lag]) for lag in (1, 2, 3, 4, 8)},
        "tokens": (x[:, 1:], x[:, :-1]),
        "the end of a token and the beginning of the next": (x[:, 1:, :4], x[:, :-1, -4:]),
        "examples": (x[1:], x[:-1]),
        "layers": (x, draw(layer=4)),
        "epochs": (x, draw(epoch=1)),
    }
    for name, (left, right) in neighbours.items():
        root_pairs = left.numel() ** 0.5
        assert abs((left * right).mean()) < 5 * m2 / root_pairs, name
        # Sizes too: uncorrelated signs would hide a radius that two normals share.
        sizes = (left.square() - m2) * (right.square() - m2)
        assert abs(sizes.mean()) < 5 * (m4 - m2**2) / root_pairs, name
