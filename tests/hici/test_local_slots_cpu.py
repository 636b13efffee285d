"""local_slots in C++ against the float64 reference: every path, both forms, every option."""

import contextlib
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hici_cases import random_mask, random_offsets
from hypothesis import given, settings
from hypothesis import strategies as st

from hici_kernels import _native, local_slots, segments
from hici_kernels.errors import ImplError
from hici_kernels.testing import assert_within_budget, budget, error

pytestmark = pytest.mark.skipif(_native.status() is not None, reason=str(_native.status()))

PATHS = list(_native.paths())
LOW = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("slots", "hidden", "slot_queries", "k_weight", "v_weight")
# (heads, slots, width): folded queries where heads * slots is well below the width, projections where it is not
FORMS = {"absorbed": (4, 3, 64), "projected": (4, 12, 32)}


def plain(hidden, slot_queries, k_weight, v_weight, *, num_heads, segment_len, attention_mask, cu_seqlens, empty):
    """Two projections and PyTorch's attention on the tokens of every segment, in the tensors' dtype."""
    m, e = slot_queries.shape
    spans = segments.spans(hidden.shape[1], segment_len, cu_seqlens)
    q = slot_queries.view(m, num_heads, -1).transpose(0, 1)
    rows = []
    for b in range(hidden.shape[0]):
        for span in spans:
            x = hidden[b, span.start : span.stop]
            scale = None
            if attention_mask is not None:
                keep = attention_mask[b, span.start : span.stop] != 0
                if keep.any():
                    x = x[keep]
                elif empty == "zero":
                    rows.append(torch.zeros_like(slot_queries))
                    continue
                else:
                    scale = 0.0
            k, v = (F.linear(x, w).view(len(x), num_heads, -1).transpose(0, 1) for w in (k_weight, v_weight))
            rows.append(F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0].transpose(0, 1))
    return torch.stack([r.reshape(m, e) for r in rows]).view(hidden.shape[0], len(spans), m, e)


def results(function, tensors, options, weights):
    """Slots and the gradients of sum(weights * slots)."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    total = (out * weights.to(out.dtype)).sum() + sum(0.0 * x[..., :0].sum() for x in leaves)
    return [out.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def weights_for(tensors, options):
    n = len(segments.spans(tensors[0].shape[1], options["segment_len"], options["cu_seqlens"]))
    return torch.randn(tensors[0].shape[0], n, *tensors[1].shape).to(tensors[0].dtype)


def make(dtype, batch, length, channels, heads, slots, width, gain=1.0):
    hidden = torch.randn(batch, length, channels)
    queries = gain * torch.randn(slots, width)
    k_weight, v_weight = (torch.randn(width, channels) / math.sqrt(channels) for _ in range(2))
    return [x.to(dtype) for x in (hidden, queries, k_weight, v_weight)]


def choose(heads, **options):
    return {
        "num_heads": heads,
        "segment_len": None,
        "attention_mask": None,
        "cu_seqlens": None,
        "empty": "zero",
        **options,
    }


def native(*tensors, **options):
    return local_slots(*tensors, **options, impl="cpu")


def reference(*tensors, **options):
    return local_slots(*tensors, **options, impl="reference")


def reordered(tensors, options, weights):
    """plain() with tokens in another order inside their segments, and channels in another order: the same function,
    other roundings. The largest of few errors is a matter of luck; that of several draws much less."""
    hidden, slot_queries, k_weight, v_weight = tensors
    length, mask = hidden.shape[1], options["attention_mask"]
    spans = segments.spans(length, options["segment_len"], options["cu_seqlens"])
    tokens = torch.cat([torch.arange(0)] + [s.start + torch.randperm(s.stop - s.start) for s in spans])
    channels = torch.randperm(hidden.shape[2])
    moved = [hidden[:, tokens][..., channels], slot_queries, k_weight[:, channels], v_weight[:, channels]]
    found = results(plain, moved, options | {"attention_mask": None if mask is None else mask[:, tokens]}, weights)
    found[1] = found[1][:, tokens.argsort()]
    return [*found[:1], found[1][..., channels.argsort()], found[2], *(x[:, channels.argsort()] for x in found[3:])]


def check(tensors, options, path=None, direct=(True,)):
    """Within the budget on ``path`` (None = the fastest); twice the budget where ``direct`` is False: small calls are
    not served by packed kernels, and there roundings that nothing averages out may cost more. The last results."""
    weights = weights_for(tensors, options)
    expected = results(reference, [x.double() for x in tensors], options, weights.double())
    draws = [results(plain, tensors, options, weights), *(reordered(tensors, options, weights) for _ in range(3))]
    for chosen in direct:
        with contextlib.nullcontext() if path is None else _native.path(path, direct=chosen):
            got = results(native, tensors, options, weights)
        for name, a, b, *usual in zip(NAMES, got, expected, *draws, strict=True):
            assert a.dtype == tensors[0].dtype and a.shape == b.shape
            if b.numel():
                worst = max(usual, key=lambda x, b=b: error(b, x))
                found, allowed = error(b, a), (1 if chosen else 2) * budget(b, worst, a.dtype)
                assert found <= allowed, f"{name} {options} {[tuple(x.shape) for x in tensors]}: {found} over {allowed}"
    return got


@settings(max_examples=240, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_random_calls(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dim = rng.choice([1, 3, 8, 16, 20])
    heads = 4 if dim == 1 else rng.choice([1, 2, 3, 4])  # gradients of one or two entries are a matter of luck
    width = heads * dim
    # on both sides of the rule, and close to it
    slots = max(1, int(dim * rng.choice([0.1, 0.3, 0.9, 1.1, 2.0])))
    packed = rng.random() < 0.3
    batch = 1 if packed else rng.randint(1, 3)
    length = rng.choice([rng.randint(1, 20), rng.randint(20, 150), rng.randint(150, 420)])
    channels = rng.choice([5, 7, 32, 33, 64, 130, 300])
    tensors = make(rng.choice(LOW), batch, length, channels, heads, slots, width, rng.choice([0.5, 1, 1, 4]))
    if rng.random() < 0.3:  # strided hidden: rows of a wider tensor, batch inside
        wider = torch.zeros(length, batch, channels + 3, dtype=tensors[0].dtype)
        wider[..., :channels] = tensors[0].transpose(0, 1)
        tensors[0] = wider[..., :channels].transpose(0, 1)
    options = choose(
        heads,
        segment_len=rng.choice([None, 1, 5, 64, 100, 1000]),
        attention_mask=random_mask(rng, batch, length),
        cu_seqlens=random_offsets(rng, length, rng.randint(1, 4)) if packed else None,
        empty=rng.choice(["zero", "uniform"]),
    )
    check(tensors, options, rng.choice(PATHS), direct=(True, False))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_form(path, dtype, form):
    torch.manual_seed(0)
    heads, slots, width = FORMS[form]
    with _native.path(path):
        # cut into chunks, several blocks each; a ragged last segment; channels that fill no vector
        for length, segment_len, channels in ((1300, None, 96), (700, 300, 77)):
            tensors = make(dtype, 1, length, channels, heads, slots, width)
            check(tensors, choose(heads, segment_len=segment_len))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_more_channels_than_one_pass(path, form):
    torch.manual_seed(1)
    heads, slots, width = FORMS[form]
    mask = torch.rand(2, 200) < 0.6
    with _native.path(path):
        for dtype in LOW:
            check(make(dtype, 2, 200, 1100, heads, slots, width), choose(heads, segment_len=90, attention_mask=mask))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "slots, segment_len, length, channels, gradients",
    [(24, 32, 2752, 1024, False), (8, 16, 640, 2048, True), (64, 500, 16500, 16, False), (64, 500, 4300, 32, True)],
)
def test_more_sums_than_are_in_memory_at_once(path, slots, segment_len, length, channels, gradients):
    """Segments are then worked on in several waves; the first two cases in the absorbed form."""
    torch.manual_seed(2)
    tensors = make(torch.bfloat16, 1, length, channels, 8, slots, 512)
    options = choose(8, segment_len=segment_len)
    with _native.path(path):
        if gradients:
            check(tensors, options)
            return
        expected = reference(*[x.double() for x in tensors], **options)
        assert_within_budget(expected, native(*tensors, **options), plain(*tensors, **options), "slots")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gain", [4.0, 16.0, 60.0])
def test_sharp_weights(path, gain):
    """Scores far apart: a rounding in proportion to them would choose other tokens."""
    torch.manual_seed(3)
    with _native.path(path):
        for dtype in LOW:
            tensors = make(dtype, 2, 333, 64, 4, 3, 64, gain)
            options = choose(4, segment_len=150)
            expected = reference(*[x.double() for x in tensors], **options)
            assert_within_budget(expected, native(*tensors, **options), plain(*tensors, **options), f"slots {dtype}")


@pytest.mark.parametrize("path", PATHS)
def test_a_channel_that_all_tokens_share(path):
    """Large common values, as trained models have: they shift all scores alike."""
    torch.manual_seed(4)
    with _native.path(path):
        for dtype in LOW:
            tensors = make(dtype, 1, 300, 96, 4, 3, 64)
            tensors[0][..., 5] += 30
            check(tensors, choose(4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_masked_columns_are_never_read(value, form):
    torch.manual_seed(5)
    heads, slots, width = FORMS[form]
    clean = make(torch.float32, 2, 130, 40, heads, slots, width)
    mask = torch.rand(2, 130) < 0.5
    mask[0, 40:80] = False  # a segment without tokens
    mask[1, :60] = False
    options = choose(heads, segment_len=40, attention_mask=mask)
    dirty = [torch.where(mask[..., None], clean[0], value), *clean[1:]]
    weights = weights_for(clean, options)
    for path in PATHS:
        with _native.path(path):
            for dtype in LOW:
                a = results(native, [x.to(dtype) for x in clean], options, weights)
                b = results(native, [x.to(dtype) for x in dirty], options, weights)
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
                assert not b[0][0, 1].any() and not b[1][~mask].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("empty", ["zero", "uniform"])
def test_segments_without_tokens(empty, form):
    torch.manual_seed(6)
    heads, slots, width = FORMS[form]
    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[0, :64] = 0
    mask[1] = 0
    for path in PATHS:
        with _native.path(path):
            for dtype in LOW:
                options = choose(heads, segment_len=32, attention_mask=mask, empty=empty)
                tensors = make(dtype, 2, 100, 40, heads, slots, width)
                found = check(tensors, options)
                assert bool(found[0][1].any()) == (empty == "uniform")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_changes_no_bit(form, dtype):
    torch.manual_seed(7)
    heads, slots, width = FORMS[form]
    tensors = make(dtype, 2, 1500, 130, heads, slots, width)
    mask = torch.rand(2, 1500) < 0.9
    threads = torch.get_num_threads()
    for segment_len in (None, 37, 700):
        options = choose(heads, segment_len=segment_len, attention_mask=mask)
        weights = weights_for(tensors, options)
        for path in PATHS:
            with _native.path(path):
                expected = results(native, tensors, options, weights)
                try:
                    for n in (1, 2, 3, 7):
                        torch.set_num_threads(n)
                        again = results(native, tensors, options, weights)
                        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True)), (path, n)
                finally:
                    torch.set_num_threads(threads)


def test_weights_of_any_strides():
    torch.manual_seed(8)
    tensors = make(torch.float32, 1, 50, 24, 2, 3, 32)
    expected = native(*tensors, **choose(2))
    turned = [tensors[0], *(x.t().contiguous().t() for x in tensors[1:])]
    cut = [tensors[0], *(torch.cat([x, x], 1)[:, : x.shape[1]] for x in tensors[1:])]
    assert torch.equal(expected, native(*turned, **choose(2))) and torch.equal(expected, native(*cut, **choose(2)))


def test_shapes_without_work():
    for batch, length, slots in ((0, 5, 2), (2, 0, 2), (2, 5, 0)):
        tensors = make(torch.float32, batch, length, 6, 2, slots, 8)
        options = choose(2, segment_len=2)
        found = results(native, tensors, options, weights_for(tensors, options))
        assert found[0].shape == (batch, -(-length // 2), slots, 8)
        assert not any(x.any() for x in found)


def test_calls_it_does_not_serve():
    tensors = make(torch.float64, 1, 8, 6, 2, 2, 8)
    with pytest.raises(ImplError, match="float64"):
        native(*tensors, **choose(2))
    hidden = torch.randn(1, 6, 8).transpose(1, 2)
    with pytest.raises(ImplError, match="contiguous in its last dimension"):
        native(hidden, *(x.float() for x in tensors[1:]), **choose(2))
    expected = local_slots(hidden.contiguous(), *(x.float() for x in tensors[1:]), num_heads=2, impl="reference")
    found = local_slots(hidden, *(x.float() for x in tensors[1:]), num_heads=2)
    torch.testing.assert_close(found, expected)


def test_the_library_guards_memory():
    tensors = make(torch.float32, 1, 8, 6, 2, 2, 8)
    library, last = _native.library(), _native.execution()
    out = torch.empty(1, 1, 2, 8)
    good = (*tensors, 2, 0, None, None, False, out, *last)
    library.local_slots_forward(*good)
    bad = {
        "k_weight": (2, torch.randn(8, 5)),
        "hidden": (0, tensors[0][0]),
        "slot_queries": (1, tensors[1].bfloat16()),
        "num_heads": (4, 3),
        "segment_len": (5, -1),
        "attention_mask": (6, torch.ones(1, 7, dtype=torch.bool)),
        "cu_seqlens": (7, torch.tensor([0, 9], dtype=torch.int32)),
        "out": (9, torch.empty(1, 2, 2, 8)),
        "path": (10, 99),
        "threads": (11, 0),
    }
    for name, (i, value) in bad.items():
        with pytest.raises((ValueError, TypeError), match=name):
            library.local_slots_forward(*good[:i], value, *good[i + 1 :])
