"""Gradients of calls with a cache."""

import random

import pytest
import torch
from hici_cases import HIDDEN, build, close, random_mask
from test_decode import RULES, config, read


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_cached_calls(decode, masked):
    layer, _ = build(config(decode))
    hidden = torch.randn(2, 15, HIDDEN, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 15)
    mask[0, :2] = 0 if masked else 1
    cache = layer.new_cache(2)
    total, at = 0.0, 0
    for n in (10, 1, 3, 1):
        part = layer(hidden[:, at : at + n], attention_mask=mask[:, at : at + n] if masked else None, cache=cache)
        total, at = total + part.square().sum(), at + n
    total.backward()
    assert hidden.grad.isfinite().all() and hidden.grad[:, -1].any()


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize("cut", ["index", "token"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_prefill_has_the_gradients_of_a_call_without_cache(decode, cut, masked):
    """Also between its segments; what it leaves in the cache is what any other prefill leaves."""
    layer, _ = build(config(decode, cut=cut))
    hidden, later = torch.randn(2, 2, 15, HIDDEN, dtype=torch.float64)
    mask = random_mask(random.Random(4), 2, 15, "holes") if masked else None
    found = []
    for cache in (None, layer.new_cache(2)):
        layer.zero_grad()
        x = hidden.clone().requires_grad_()
        out = layer(x, attention_mask=mask, cache=cache)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        close(one, other)
    _, plain = read(layer, hidden, [15], mask)
    assert all(any(p.grad.any() for p in m.parameters()) for m in (layer.local_constructor, layer.global_integrator))
    close(read(layer, later, [2, 7], cache=cache)[0], read(layer, later, [2, 7], cache=plain)[0])


def test_slots_alone_are_reason_enough_for_gradients():
    layer, _ = build(config())
    layer.requires_grad_(False)
    layer.local_constructor.requires_grad_(True)
    hidden = torch.randn(1, 9, HIDDEN, dtype=torch.float64)
    layer(hidden, cache=layer.new_cache(1)).sum().backward()
    assert all(p.grad.any() for p in layer.local_constructor.parameters())


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize(
    "wanted", ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "q_norm.weight"]
)
def test_later_calls_leave_the_gradients_of_earlier_ones_alone(decode, wanted):
    """Whatever wants them: autograd may have saved what the next call writes into."""
    layer, _ = build(config(decode), eps=1e-6)
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    parameter = dict(layer.named_parameters())[wanted]

    def gradient(later):
        layer.requires_grad_(False)
        _, cache = read(layer, hidden[:, :6], [6])
        parameter.requires_grad_()
        out = layer(hidden[:, 6:7], cache=cache)
        if later:
            read(layer, hidden[:, 7:], [1, 1], cache=cache)
        return torch.autograd.grad(out.square().sum(), parameter)[0]

    assert torch.equal(gradient(True), gradient(False))
