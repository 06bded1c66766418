"""The public operation: registration, compilation, checkpointing, use twice, errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dist_reg import ops
from tests.test_ops import on_devices

LAYERS, SHAPE = 3, (2, 5, 12)


def inputs(device="cpu", dtype=torch.float32):
    """L states [B, T, D] and gates [L, B], all leaves."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(LAYERS)]
    gates = torch.rand((LAYERS, SHAPE[0]), generator=generator).to(device)
    return [state.requires_grad_() for state in states], gates.requires_grad_()


def block(states, gates):
    """sin -> layer_mix -> cos; the loss of a small model."""
    mixed = ops.layer_mix([state.sin() for state in states], gates)
    return mixed, (mixed * mixed.cos()).sum()


def gradients(loss, given):
    states, gates = given
    return torch.autograd.grad(loss, [*states, gates])


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    states, gates = inputs(device, dtype)
    strided = states[1].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    torch.library.opcheck(torch.ops.dist_reg.layer_mix, ([states[0], strided, states[2]], gates))
    apart = [state.detach() for state in states]
    upstream = torch.randn_like(apart[0])
    torch.library.opcheck(torch.ops.dist_reg.layer_mix_backward, (upstream, apart, gates.detach()))


@on_devices
def test_a_block_compiles_without_a_graph_break(device):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    given = inputs(device)
    got, expected = compiled(*given), block(*given)
    assert torch.equal(got[0], expected[0])
    for one, other in zip(gradients(got[1], given), gradients(expected[1], given)):
        assert torch.equal(one, other)


@on_devices
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_replays_the_block(device, reentrant):
    (states, gates), (replayed, own) = inputs(device), inputs(device)
    block(states, gates)[1].backward()
    checkpoint(
        lambda *given: block(given[:-1], given[-1])[1], *replayed, own, use_reentrant=reentrant
    ).backward()
    for one, other in zip([*states, gates], [*replayed, own]):
        assert torch.equal(one.grad, other.grad)


@on_devices
def test_one_state_at_two_places_and_two_calls_in_one_graph(device):
    states, gates = inputs(device)
    twice = [states[0], states[1], states[0]]
    loss = (ops.layer_mix(twice, gates) * ops.layer_mix(states, gates).sin()).sum()
    loss.backward()
    apart, own = inputs(device)
    stacked = torch.stack([apart[0], apart[1], apart[0]])
    first = (own[:, :, None, None] * stacked).sum(0)
    second = (own[:, :, None, None] * torch.stack(apart)).sum(0)
    (first * second.sin()).sum().backward()
    for one, other in zip([*states, gates], [*apart, own]):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


@on_devices
def test_gradient_in_float64(device):
    states, gates = inputs(device, torch.float64)
    wide = gates.detach().double().requires_grad_()
    torch.autograd.gradcheck(lambda gates, *states: ops.layer_mix(states, gates), (wide, *states))


ERRORS = [
    (lambda states, gates: ([], gates), "states must hold the hidden states of one layer or more, got none"),
    (lambda states, gates: ([states[0][0]], gates), r"states\[0\] must be \[batch, tokens, channels\]"),
    (
        lambda states, gates: ([states[0], states[1][:, :2]], gates),
        r"states\[1\] must have the shape of states\[0\], \[2, 5, 12\], got \[2, 2, 12\]",
    ),
    (
        lambda states, gates: ([states[0], states[1].half()], gates),
        r"states\[1\] must have the dtype of states\[0\], torch.float32, got torch.float16",
    ),
    (
        lambda states, gates: ([states[0], states[1].to("meta")], gates),
        r"states\[1\] must have the device of states\[0\], cpu, got meta",
    ),
    (lambda states, gates: (states, gates.T), r"gates must be torch.float32 \[layers, batch\] = \[3, 2\]"),
    (lambda states, gates: (states, gates.double()), "gates must be torch.float32.*got torch.float64"),
    (lambda states, gates: (states, gates.to("meta")), "gates must be on cpu like hidden_states, got meta"),
    (lambda states, gates: ([state.int() for state in states], gates), r"states\[0\] must be float32.*int32"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors_name_the_argument_and_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        ops.layer_mix(*change(*inputs()))
