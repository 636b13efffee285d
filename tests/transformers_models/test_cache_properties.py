"""Any sequence of calls on a cache equals the same text at once: pieces, beams reordered, columns taken back."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FEW, hici_config, randomise_slots, tiny, worst
from torch import Tensor

from hici_kernels.integrations import HGACache, apply_hga, apply_hici

TOLERANCE = 1e-5
PADDING = st.lists(st.integers(0, 6), min_size=2, max_size=2)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 13)),
        st.tuples(st.just("crop"), st.integers(1, 9)),
        st.tuples(st.just("reorder"), st.permutations([0, 1])),
        st.tuples(st.just("copy"), st.integers(0, 1)),
    ),
    min_size=2,
    max_size=9,
)
RULES = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class Text:
    """Two rows of tokens with left padding, and what a cache was told of them."""

    def __init__(self, padding: list[int], seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.ids = torch.zeros(2, 0, dtype=torch.int64)
        self.mask = torch.zeros(2, 0, dtype=torch.int64)
        self.padding = padding

    def more(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids, positions of ``count`` further columns and the mask up to them."""
        start = self.ids.shape[1]
        new = torch.randint(3, 97, (2, count), generator=self.draw)
        column = torch.arange(start, start + count)
        self.ids = torch.cat((self.ids, new), 1)
        self.mask = torch.cat((self.mask, (column >= torch.tensor(self.padding)[:, None]).long()), 1)
        return new, (self.mask.cumsum(1) - 1).clamp(min=0)[:, start:], self.mask

    def reorder(self, rows: list[int]) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        self.padding = [self.padding[r] for r in rows]


def play(model, cache, steps, padding, can_crop) -> None:
    text = Text(padding)
    for step, value in [("feed", 8), *steps, ("feed", 3)]:
        if step == "feed":
            ids, at, mask = text.more(value)
            out = model(ids, position_ids=at, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            whole = model(
                text.ids, position_ids=(mask.cumsum(1) - 1).clamp(min=0), attention_mask=mask, use_cache=False
            )
            seen = mask[:, -value:].bool()
            if bool(seen.any()):
                assert worst(out.logits[seen], whole.logits[:, -value:][seen]) < TOLERANCE
        elif step == "crop":
            keep = text.ids.shape[1] - value
            if keep >= 8 and can_crop(cache, value):
                cache.crop(-value)
                text.ids, text.mask = text.ids[:, :keep], text.mask[:, :keep]
        else:
            rows = list(value) if step == "reorder" else [value, value]
            cache.reorder_cache(torch.tensor(rows))
            text.reorder(rows)
        assert cache.get_seq_length() == text.ids.shape[1]


@pytest.fixture(scope="module")
def routed():
    return apply_hga(tiny("qwen3"), FEW)


@pytest.fixture(scope="module")
def slotted():
    config = hici_config(decode="segment", recurrence_len=3)
    return randomise_slots(apply_hici(tiny("qwen3"), config))


@torch.no_grad()
@RULES
@given(steps=STEPS, padding=PADDING)
def test_hga(routed, steps, padding):
    play(routed, HGACache(routed), steps, padding, lambda cache, count: True)


@torch.no_grad()
@RULES
@given(steps=STEPS, padding=PADDING)
def test_hici(slotted, steps, padding):
    """decode="segment": columns can be taken back while they are all in the open segment."""

    def inside(cache, count: int) -> bool:
        held = cache.layers[0].cache
        return all(count <= int(filled) for filled in held.filled)

    play(slotted, None, steps, padding, inside)
