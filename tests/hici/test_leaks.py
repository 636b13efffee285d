"""Which earlier outputs change when one token's value changes: the leak table of HiCI's context modes.

Values are replaced, not differentiated: maxima and minima leak without a gradient.
"""

import itertools

import pytest
import torch
from hici_cases import HIDDEN, build
from hici_oracle import LEAK_FREE, MODES

from hici_kernels import HiCIConfig

LENGTH, SEGMENT = 12, 4
SMALL = {"num_local_slots": 2, "global_slots": 2, "num_heads": 2, "bottleneck_dim": 4, "shared_compress_dim": 2}
ABLATIONS = list(itertools.product([True, False], repeat=2))
CUTS = [{"segment_len": SEGMENT}, {"num_segments": LENGTH // SEGMENT}]


def reach(config, use_global, use_local):
    """How far back a token is felt: "all", "segment" or "nothing"."""
    global_reach = {"none": "all", "causal_gi": "segment", "causal_gi_gonly": "segment"}.get(config, "nothing")
    local_reach = "segment" if config in ("none", "causal_gi") else "nothing"
    found = [global_reach] * use_global + [local_reach] * use_local
    return "all" if "all" in found else "segment" if "segment" in found else "nothing"


def changed(layer, hidden, at, run):
    other = hidden.clone()
    other[:, at] = 30 * torch.randn(HIDDEN, dtype=hidden.dtype, generator=torch.Generator().manual_seed(at))
    with torch.no_grad():
        before, after = run(layer, hidden), run(layer, other)
    return (before != after).any(-1)[0]


@pytest.mark.parametrize("cut", CUTS, ids=["segment_len", "num_segments"])
@pytest.mark.parametrize("use_global, use_local", ABLATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recurrence", [0, 3])
def test_leak_table(mode, use_global, use_local, cut, recurrence):
    config = HiCIConfig(
        **SMALL, **cut, context_mode=mode, use_global=use_global, use_local=use_local, recurrence_len=recurrence
    )
    layer, _ = build(config)
    hidden = torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64)
    expected = reach(mode, use_global, use_local)
    for at in (3, 6, 7, 11):
        felt = changed(layer, hidden, at, lambda layer, x: layer(x))
        assert felt[at]
        start = at // SEGMENT * SEGMENT
        earlier = {
            "all": [True] * at,
            "segment": [False] * start + [True] * (at - start),
            "nothing": [False] * at,
        }[expected]
        assert felt[:at].tolist() == earlier, (mode, at, felt)


@pytest.mark.parametrize("mode", MODES)
def test_leak_table_of_packed_documents(mode):
    layer, _ = build(HiCIConfig(**SMALL, segment_len=3, context_mode=mode, recurrence_len=2))
    hidden = torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64)
    cu = torch.tensor([0, 5, LENGTH], dtype=torch.int32)
    for at in (4, 9):
        felt = changed(layer, hidden, at, lambda layer, x: layer(x, cu_seqlens=cu))
        start, stop = (0, 5) if at == 4 else (5, LENGTH)
        assert not felt[:start].any() and not felt[stop:].any()
        if mode in LEAK_FREE:
            assert not felt[:at].any()
        assert felt[start:at].all() == (mode == "none")


@pytest.mark.parametrize("mode", LEAK_FREE)
@pytest.mark.parametrize("use_global, use_local", ABLATIONS)
@pytest.mark.parametrize("calls", [[12], [1] * 12, [5, 1, 6]])
def test_decode_leaks_nothing(mode, use_global, use_local, calls):
    config = HiCIConfig(
        **SMALL,
        segment_len=SEGMENT,
        context_mode=mode,
        use_global=use_global,
        use_local=use_local,
        recurrence_len=2,
        decode="segment",
    )
    layer, _ = build(config)
    hidden = torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64)

    def run(layer, x):
        cache = layer.new_cache(1)
        return torch.cat([layer(part, cache=cache) for part in x.split(calls, 1)], 1)

    for at in (3, 6, 11):
        felt = changed(layer, hidden, at, run)
        assert felt[at] and not felt[:at].any()


@pytest.mark.parametrize("mode", LEAK_FREE)
def test_slots_carry_the_past_forward(mode):
    """The opposite of a leak: without this, an implementation that drops all slots would pass the tests above."""
    layer, _ = build(HiCIConfig(**SMALL, segment_len=SEGMENT, context_mode=mode))
    hidden = torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64)
    assert changed(layer, hidden, 1, lambda layer, x: layer(x))[1:].all()
    none = HiCIConfig(**SMALL, segment_len=SEGMENT, context_mode=mode, use_global=False, use_local=False)
    felt = changed(build(none)[0], hidden, 1, lambda layer, x: layer(x))
    assert felt[1:SEGMENT].all() and not felt[SEGMENT:].any()


@pytest.mark.parametrize("mode", LEAK_FREE)
def test_only_segment_len_is_stable_when_the_text_grows(mode):
    hidden = torch.randn(1, 13, HIDDEN, dtype=torch.float64)
    fixed, _ = build(HiCIConfig(**SMALL, segment_len=SEGMENT, context_mode=mode))
    ratio, _ = build(HiCIConfig(**SMALL, num_segments=3, context_mode=mode))
    with torch.no_grad():
        torch.testing.assert_close(fixed(hidden)[:, :12], fixed(hidden[:, :12]), rtol=0, atol=1e-12)
        assert (ratio(hidden)[:, :12] - ratio(hidden[:, :12])).abs().max() > 1e-3
