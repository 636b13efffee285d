"""Frequencies of a Rope on other devices: copied once, no part of its value."""

from __future__ import annotations

import copy
import pickle

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hici_kernels import Rope

META = torch.device("meta")


def test_copied_once_a_device() -> None:
    rope = Rope.from_theta(1e4, 8)
    assert rope.frequencies(torch.device("cpu")) is rope.inv_freq
    with torch.inference_mode():
        there = rope.frequencies(META)
    assert there.device == META and not there.is_inference() and rope.frequencies(META) is there
    assert rope.rotate(torch.empty(1, 3, 2, 8, device=META), torch.arange(3, device=META)).device == META
    for other in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert torch.equal(other.inv_freq, rope.inv_freq) and other.frequencies(META) is not there
        assert (other.attention_scaling, other.rotary_dim) == (rope.attention_scaling, rope.rotary_dim)
    assert "_copies" not in repr(rope)


def test_what_a_mode_makes_is_not_kept() -> None:
    rope = Rope.from_theta(1e4, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rope.frequencies(META)
    assert type(rope.frequencies(META)) is torch.Tensor
