"""Caches: the three decode rules, rows of different lengths, and what must not change when a call fails."""

import copy
import random

import pytest
import torch
from hici_cases import HIDDEN, build, close, random_layer, random_mask
from hici_oracle import LEAK_FREE

from hici_kernels import HiCIConfig, Rope
from hici_kernels.nn import HiCIAttention

SMALL = {"num_local_slots": 2, "global_slots": 2, "num_heads": 2, "bottleneck_dim": 4, "shared_compress_dim": 2}
RULES = ("segment", "full", "slots")


def config(decode="segment", **options):
    return HiCIConfig(**{**SMALL, "segment_len": 4, "recurrence_len": 2, "decode": decode, **options})


def random_calls(rng, length):
    calls = []
    while sum(calls) < length:
        calls.append(rng.randint(1, rng.choice([1, 3, length - sum(calls)])) if length - sum(calls) > 2 else 1)
    return calls


def read(layer, hidden, calls, mask=None, positions=None, cache=None):
    cache = layer.new_cache(hidden.shape[0]) if cache is None else cache
    outs, at = [], 0
    with torch.no_grad():
        for n in calls:
            outs.append(
                layer(
                    hidden[:, at : at + n],
                    attention_mask=None if mask is None else mask[:, at : at + n],
                    positions=None if positions is None else positions[:, at : at + n],
                    cache=cache,
                )
            )
            at += n
    return torch.cat(outs, 1) if outs else hidden[:, :0], cache


def picture(cache):
    """Everything a cache holds, for comparison before and after."""
    return {name: x.clone() if isinstance(x, torch.Tensor) else copy.copy(x) for name, x in vars(cache).items()}


def futures_equal(layer, cache, before, row_count):
    """Observable state: lengths, and what the next tokens get."""
    hidden = torch.randn(row_count, 6, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(cache.lengths, before.lengths)
    one, _ = read(layer, hidden, [1, 5], cache=copy.deepcopy(cache))
    other, _ = read(layer, hidden, [1, 5], cache=copy.deepcopy(before))
    assert torch.equal(one, other)


# decode="segment": one semantics


def segment_case(seed, **fixed):
    mode = LEAK_FREE[seed % 2]
    fixed.setdefault("segment_len", random.Random(seed).choice([1, 2, 3, 4, 7]))
    return random_layer(seed, decode="segment", context_mode=mode, **fixed)


@pytest.mark.parametrize("seed", range(40))
def test_any_split_equals_training(seed):
    rng, layer, oracle = segment_case(seed)
    length = rng.randint(1, 16)
    hidden = torch.randn(2, length, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(hidden)
    close(whole, oracle.batch(hidden), 1e-9, "training")
    for calls in ([length], [1] * length, random_calls(rng, length), random_calls(rng, length)):
        found, cache = read(layer, hidden, calls)
        close(found, whole, 1e-10, f"{seed} {calls} {layer.config}")
        assert cache.lengths.tolist() == [length] * 2


@pytest.mark.parametrize("seed", range(60))
def test_any_split_of_padded_rows_equals_training(seed):
    rng, layer, oracle = segment_case(100 + seed)
    batch, length = rng.randint(1, 3), rng.randint(1, 16)
    hidden = torch.randn(batch, length, HIDDEN, dtype=torch.float64)
    mask = random_mask(rng, batch, length)
    positions = torch.randint(0, 50, (batch, length)) if seed % 3 == 0 else None
    with torch.no_grad():
        whole = layer(hidden, attention_mask=mask, positions=positions)
    close(whole, oracle.batch(hidden, mask=mask, positions=positions), 1e-9, "training")
    for calls in ([length], [1] * length, random_calls(rng, length)):
        found, cache = read(layer, hidden, calls, mask, positions)
        close(found, whole, 1e-10, f"{seed} {calls} {layer.config} {mask}")
        counts = torch.full((batch,), length) if mask is None else mask.sum(1)
        assert torch.equal(cache.lengths, counts) and cache.lengths.dtype == torch.int64


@pytest.mark.parametrize("use_global, use_local", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("mode", LEAK_FREE)
@pytest.mark.parametrize("single", ["on", "off"])
def test_ablations_in_float32(mode, use_global, use_local, single):
    c = config(context_mode=mode, use_global=use_global, use_local=use_local, single_segment=single)
    layer, _ = build(c, eps=1e-6, dtype=torch.float32)
    hidden = torch.randn(3, 19, HIDDEN)
    with torch.no_grad():
        whole = layer(hidden)
    for calls in ([19], [1] * 19, [7, 1, 1, 10]):
        close(read(layer, hidden, calls)[0], whole, 1e-5, f"{calls}")


def test_cache_is_bounded_over_100_segments():
    layer, _ = build(config(), dtype=torch.float32)
    hidden = torch.randn(2, 400, HIDDEN)
    cache = layer.new_cache(2)
    outs, sizes = [], []
    with torch.no_grad():
        for part in hidden.split(4, 1):
            outs.append(layer(part, cache=cache))
            sizes.append(cache.nbytes)
        close(torch.cat(outs, 1), layer(hidden), 1e-5)
    assert len(sizes) == 100 and len(set(sizes)) == 1
    width = layer.num_kv_heads * layer.head_dim
    tokens = 4 * (HIDDEN + 2 * width) + 2 * 2 * width + 4 * 2 * width + 4 * HIDDEN
    assert sizes[0] <= 2 * (4 * tokens + 200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_cache(dtype):
    layer, _ = build(config(), dtype=dtype)
    hidden = torch.randn(2, 13, HIDDEN).to(dtype)
    with torch.no_grad():
        whole = layer(hidden)
    found, _ = read(layer, hidden, [3, 1, 9])
    assert found.dtype == dtype
    close(found, whole, 60 * torch.finfo(dtype).eps)


# "full" and "slots"


@pytest.mark.parametrize("decode", ["full", "slots"])
@pytest.mark.parametrize("seed", range(40))
def test_published_rules(decode, seed):
    rng, layer, oracle = random_layer(7000 + seed, decode=decode)
    length = rng.randint(2, 13)
    hidden = torch.randn(2, length, HIDDEN, dtype=torch.float64)
    mask = random_mask(rng, 2, length, rng.choice(["none", "left", "holes", "gap", "right"]))
    calls = random_calls(rng, length)
    if mask is not None:
        mask[:, 0] = 1
    found, cache = read(layer, hidden, calls, mask)
    for b in range(2):
        expected = oracle.decode(hidden[b], calls, mask=None if mask is None else mask[b])
        close(found[b], expected, 1e-9, f"{seed} {calls} {layer.config} {mask}")
    assert cache.lengths.tolist() == ([length] * 2 if mask is None else mask.sum(1).tolist())


@pytest.mark.parametrize("decode", ["full", "slots"])
def test_second_call_of_a_prompt_is_decode(decode):
    layer, oracle = build(config(decode, context_mode="none"))
    hidden = torch.randn(1, 12, HIDDEN, dtype=torch.float64)
    found, _ = read(layer, hidden, [4, 8])
    close(found[0], oracle.decode(hidden[0], [4, 8]), 1e-9)
    with torch.no_grad():
        assert (found - layer(hidden)).abs().max() > 1e-3


# all rules


@pytest.mark.parametrize("decode", RULES)
def test_default_positions_continue_after_the_cache(decode):
    layer, _ = build(config(decode))
    hidden = torch.randn(2, 11, HIDDEN, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, 5:7] = 0
    at = torch.arange(11).expand(2, -1)
    calls = [5, 2, 1, 3]
    assert torch.equal(read(layer, hidden, calls, mask)[0], read(layer, hidden, calls, mask, at)[0])


@pytest.mark.parametrize("decode", RULES)
def test_reset_of_a_row_and_of_all(decode):
    layer, _ = build(config(decode))
    hidden = torch.randn(3, 17, HIDDEN, dtype=torch.float64)
    first, cache = read(layer, hidden[:, :6], [6])
    cache.reset(1)
    assert cache.lengths.tolist() == [6, 0, 6]
    later, _ = read(layer, hidden[:, 6:], [1, 3, 7], cache=cache)
    straight, _ = read(layer, hidden, [6, 1, 3, 7])
    close(later[[0, 2]], straight[[0, 2], 6:], 1e-11)
    if decode == "segment":
        alone, _ = read(layer, hidden[1:2, 6:], [11])
        close(later[1:2], alone, 1e-11)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    again, _ = read(layer, hidden[:, :6], [6], cache=cache)
    close(again, first, 1e-12)


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_reorder(decode, as_tensor):
    layer, _ = build(config(decode))
    hidden = torch.randn(3, 9, HIDDEN, dtype=torch.float64)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0
    _, cache = read(layer, hidden, [6, 3], mask)
    rows = [2, 0, 0, 1]
    cache.reorder(torch.tensor(rows) if as_tensor else rows)
    assert cache.lengths.tolist() == [9, 5, 5, 9]
    more = torch.randn(4, 7, HIDDEN, dtype=torch.float64)
    found, _ = read(layer, more, [1, 6], cache=cache)
    straight, _ = read(
        layer, torch.cat([hidden[rows], more], 1), [6, 3, 1, 6], torch.cat([mask[rows], torch.ones(4, 7)], 1)
    )
    close(found, straight[:, 9:], 1e-11)


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize("seed", range(12))
def test_rewind(decode, seed):
    rng, layer, _ = random_layer(
        300 + seed, decode=decode, segment_len=5, context_mode="causal_shift", recurrence_len=seed % 3
    )
    hidden = torch.randn(2, 14, HIDDEN, dtype=torch.float64)
    more = torch.randn(2, 8, HIDDEN, dtype=torch.float64)
    prompt, keep = 11, rng.randint(11, 14)
    _, cache = read(layer, hidden, [prompt, 3])
    row = rng.choice([None, 0, 1])
    cache.rewind(keep) if row is None else cache.rewind(keep, row)
    lengths = [keep, keep] if row is None else [keep if b == row else 14 for b in range(2)]
    assert cache.lengths.tolist() == lengths
    found, _ = read(layer, more, [2, 6], cache=cache)
    for b in range(2):
        kept = hidden[b : b + 1, : lengths[b]]
        calls = [prompt, lengths[b] - prompt, 2, 6] if lengths[b] > prompt else [prompt, 2, 6]
        fresh, _ = read(layer, torch.cat([kept, more[b : b + 1]], 1), calls)
        close(found[b : b + 1], fresh[:, lengths[b] :], 1e-11, f"row {b} kept {lengths[b]}")


def test_rewind_full_into_the_prompt_and_to_nothing():
    layer, _ = build(config("full"))
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    more = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    _, cache = read(layer, hidden, [6, 3])
    cache.rewind(4)
    found, _ = read(layer, more, [5], cache=cache)
    q, k, v = layer.project(torch.cat([hidden[:, :4], more], 1), torch.arange(9))
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 2
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    full = layer.o_proj(torch.einsum("bhts,bshd->bthd", scores, v.repeat_interleave(2, 2)).flatten(2))
    close(found, full[:, 4:].detach(), 1e-11)
    cache.rewind(0)
    assert cache.lengths.tolist() == [0, 0]
    close(read(layer, hidden, [6, 3], cache=cache)[0], read(layer, hidden, [6, 3])[0], 1e-11)


@pytest.mark.parametrize("decode", ["full", "segment"])
@pytest.mark.parametrize(
    "cut, calls, keep, expected",
    [
        ("token", [[0, 0, 1]], 0, 0),
        ("index", [[0, 0, 1]], 0, 0),
        ("token", [[0, 1, 1]], 1, 2),
        ("token", [[1, 1, 1, 1], [0, 1]], 4, 4),
        ("index", [[1, 1, 1, 1], [0, 1]], 4, 4),
        ("token", [[1, 1, 1, 1], [0, 1]], 5, 6),
        ("token", [[1, 0, 1, 1, 1], [0, 1, 1]], 4, 5),
        ("index", [[1, 1, 1, 0], [0, 1]], 3, 3),
        ("index", [[1, 1, 1, 0], [0, 0, 0, 0], [1]], 3, 3),
        ("token", [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]], 8, 8),
    ],
)
def test_the_next_position_follows_the_last_token_kept(decode, cut, calls, keep, expected):
    layer, _ = build(config(decode, cut=cut))
    mask = torch.tensor([[seen for call in calls for seen in call]])
    hidden = torch.randn(1, mask.shape[1], HIDDEN, dtype=torch.float64)
    _, cache = read(layer, hidden, [len(x) for x in calls], mask)
    cache.rewind(keep)
    assert cache.next_columns(torch.device("cpu")).tolist() == [expected]
    one = torch.randn(1, 1, HIDDEN, dtype=torch.float64)
    branch = copy.deepcopy(cache)
    assert torch.equal(
        read(layer, one, [1], cache=cache)[0],
        read(layer, one, [1], positions=torch.tensor([[expected]]), cache=branch)[0],
    )


@pytest.mark.parametrize("decode", RULES)
def test_wrong_rewinds_change_nothing(decode):
    layer, _ = build(config(decode))
    hidden = torch.randn(2, 10, HIDDEN, dtype=torch.float64)
    mask = torch.ones(2, 10)
    mask[1, :3] = 0
    _, cache = read(layer, hidden, [7, 3], mask)
    before = copy.deepcopy(cache)
    wrong = [(11, None), (8, 1), (8, None), (-1, None), (4, 2), (4, -1)]
    if decode == "segment":
        wrong += [(7, 0), (3, 1), (0, None)]
    if decode == "slots":
        wrong += [(6, 0), (3, 1), (5, None)]
    for length, row in wrong:
        with pytest.raises(ValueError):
            cache.rewind(length, row)
    for length, row in ((1.0, None), ("3", None), (True, None), (3, 1.0)):
        with pytest.raises(TypeError):
            cache.rewind(length, row)
    for rows in ([0, 2], [-1], torch.tensor([5])):
        with pytest.raises(ValueError):
            cache.reorder(rows)
    for row in (2, -1):
        with pytest.raises(ValueError):
            cache.reset(row)
    futures_equal(layer, cache, before, 2)


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize("filled", [True, False])
def test_a_bad_call_changes_nothing(decode, filled):
    layer, _ = build(config(decode))
    other, _ = build(config(decode), kv_heads=4)
    hidden = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    _, cache = read(layer, hidden, [6] if filled else [])
    before = copy.deepcopy(cache)
    bad = [
        lambda: layer(hidden[:1], cache=cache),
        lambda: layer(hidden.float(), cache=cache),
        lambda: layer(hidden[:, :, :5], cache=cache),
        lambda: layer(hidden, cache=cache, positions=torch.zeros(3, dtype=torch.int64)),
        lambda: layer(hidden, cache=cache, positions=torch.zeros(6)),
        lambda: layer(hidden, cache=cache, attention_mask=torch.ones(2, 5)),
        lambda: layer(hidden[:1], cache=cache, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)),
        lambda: layer(hidden.to("meta"), cache=cache),
        lambda: build(config(decode, recurrence_len=1))[0](hidden, cache=cache),
        lambda: build(config("full" if decode == "segment" else "segment"))[0](hidden, cache=cache),
        lambda: layer(hidden, cache={}),
    ]
    if filled:
        bad.append(lambda: other(hidden, cache=cache))
    for call in bad:
        with pytest.raises((ValueError, TypeError)):
            call()
        futures_equal(layer, cache, before, 2)


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize("part, new", [("o_proj", 10), ("o_proj", 1), ("local_constructor", 10)])
def test_a_failure_inside_a_call_changes_nothing(decode, part, new, monkeypatch):
    """Whatever fails after the checks (memory, a kernel), the same call can be made again."""
    layer, _ = build(config(decode))
    hidden = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    _, cache = read(layer, hidden[:, :3], [3])
    before = copy.deepcopy(cache)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise MemoryError

        patch.setattr(getattr(layer, part), "forward", fail)
        if part == "o_proj" or decode == "segment":
            with pytest.raises(MemoryError):
                read(layer, hidden[:, 3 : 3 + new], [new], cache=cache)
    futures_equal(layer, cache, before, 2)


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_another_dtype_than_that_of_the_cache_changes_nothing(decode, first):
    layer, _ = build(config(decode))
    hidden, cache = torch.randn(2, 6, HIDDEN, dtype=torch.float64), layer.new_cache(2)
    read(layer.to(first), hidden.to(first), [5], cache=cache)
    before = picture(cache)
    other = torch.float64 if first == torch.float32 else torch.float32
    with pytest.raises(TypeError, match="cache holds"):
        read(layer.to(other), hidden.to(other), [6], cache=cache)
    for name, x in picture(cache).items():
        assert torch.equal(x, before[name]) if isinstance(x, torch.Tensor) else x == before[name]


@pytest.mark.parametrize("decode", RULES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "modes",
    [
        (torch.inference_mode, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
        (torch.inference_mode, torch.enable_grad),
        (torch.inference_mode, torch.inference_mode),
    ],
    ids=lambda modes: "-".join(mode.__name__ for mode in modes),
)
def test_a_cache_goes_in_and_out_of_inference_mode(decode, masked, modes):
    layer, _ = build(config(decode))
    hidden = torch.randn(2, 26, HIDDEN, dtype=torch.float64)
    mask = torch.ones(2, 26, dtype=torch.int64)
    mask[0, :2] = 1 - int(masked)

    def program(modes):
        """Two rounds of everything a cache can do, every step in the other mode than the one before."""
        outs, cache, at = [], None, 0

        def call(n):
            nonlocal cache, at
            cache = layer.new_cache(2) if cache is None else cache
            given = mask[:, at : at + n] if masked else None
            outs.append(layer(hidden[:, at : at + n], attention_mask=given, cache=cache).detach())
            at += n

        def copied():
            nonlocal cache
            cache = copy.deepcopy(cache)

        actions = [
            lambda: call(6),
            lambda: call(1),
            lambda: call(2),
            lambda: cache.rewind(int(cache.lengths[0]) - 1, 0),
            lambda: call(1),
            copied,
            lambda: call(1),
            lambda: cache.reorder([1, 0]),
            lambda: call(1),
            lambda: cache.reset(1),
            lambda: call(1),
            lambda: cache.reset(),
        ]
        for step, action in enumerate(actions * 2):
            with modes[step % 2]():
                action()
        return torch.cat(outs, 1)

    assert torch.equal(program(modes), program((torch.no_grad, torch.no_grad)))


@pytest.mark.parametrize("decode", RULES)
def test_calls_without_tokens(decode):
    layer, _ = build(config(decode))
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    straight, _ = read(layer, hidden, [5, 4])
    cache = layer.new_cache(2)
    first, _ = read(layer, hidden[:, :0], [0], cache=cache)
    assert first.shape == (2, 0, HIDDEN) and cache.lengths.tolist() == [0, 0]
    found, _ = read(layer, hidden, [5, 0, 4], cache=cache)
    close(found, straight, 1e-12)
    nobody, _ = read(layer, hidden, [3, 6], torch.zeros(2, 9))
    assert not nobody.any()
    assert layer(hidden[:0], cache=layer.new_cache(0)).shape == (0, 9, HIDDEN)


@pytest.mark.parametrize("decode", RULES)
def test_poisoned_padding_never_reaches_a_token(decode):
    layer, _ = build(config(decode))
    clean = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    mask = torch.ones(2, 12)
    mask[0, :3] = mask[1, 4:6] = mask[0, 10] = 0
    poisoned = clean.clone()
    poisoned[mask == 0] = float("nan")
    one, _ = read(layer, poisoned, [5, 1, 6], mask)
    other, _ = read(layer, clean, [5, 1, 6], mask)
    assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("decode", RULES)
def test_lengths_is_a_copy_and_cache_survives_deepcopy(decode):
    layer, _ = build(config(decode))
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    _, cache = read(layer, hidden, [6])
    cache.lengths.zero_()
    assert cache.lengths.tolist() == [6, 6]
    branch = copy.deepcopy(cache)
    one, _ = read(layer, hidden[:, 6:], [3], cache=cache)
    other, _ = read(layer, hidden[:, 6:], [1, 2], cache=branch)
    close(one, other, 1e-11)


def random_program(seed, decode):
    """Random calls, resets, reorders and rewinds against a model that keeps whole rows and recomputes."""
    rng, layer, oracle = random_layer(
        900 + seed, decode=decode, segment_len=4, context_mode="causal_shift", cut="token", empty="skip"
    )
    cache, rows = layer.new_cache(2), [torch.zeros(0, HIDDEN, dtype=torch.float64) for _ in range(2)]
    places = [[], []]
    for _ in range(14):
        action = rng.choice(["call", "call", "call", "reset", "reorder", "rewind"])
        if action == "call":
            n = rng.randint(1, 6)
            x, mask = torch.randn(len(rows), n, HIDDEN, dtype=torch.float64), random_mask(rng, len(rows), n)
            at = torch.randint(0, 60, (len(rows), n))
            with torch.no_grad():
                found = layer(x, attention_mask=mask, positions=at, cache=cache)
            for b in range(len(rows)):
                kept = torch.ones(n).bool() if mask is None else mask[b].bool()
                old = len(rows[b])
                rows[b] = torch.cat([rows[b], x[b, kept]])
                places[b] = places[b] + at[b, kept].tolist()
                expected = oracle.row(rows[b], positions=places[b])[old:]
                close(found[b, kept], expected, 1e-9, f"{seed} row {b}")
        elif action == "reset":
            b = rng.randrange(len(rows))
            cache.reset(b)
            rows[b], places[b] = rows[b][:0], []
        elif action == "reorder":
            order = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 3))]
            cache.reorder(order)
            rows, places = [rows[i] for i in order], [list(places[i]) for i in order]
        else:
            b = rng.randrange(len(rows))
            keep = rng.randint(len(rows[b]) // 4 * 4, len(rows[b]))
            cache.rewind(keep, b)
            rows[b], places[b] = rows[b][:keep], places[b][:keep]
        assert cache.lengths.tolist() == [len(x) for x in rows]


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed):
    random_program(seed, "segment")


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_many_random_programs(block):
    for seed in range(100 + 20 * block, 120 + 20 * block):
        random_program(seed, "segment")


@pytest.mark.parametrize("decode", ["full", "slots", "segment"])
def test_a_rewind_to_the_present_length_changes_nothing(decode):
    config = HiCIConfig(
        num_local_slots=3,
        global_slots=2,
        num_heads=2,
        bottleneck_dim=8,
        shared_compress_dim=4,
        segment_len=4,
        decode=decode,
    )
    layer = HiCIAttention(16, 2, 1, 8, config, rope=Rope.from_theta(1e4, 8))
    hidden = torch.randn(2, 9, 16)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False  # trailing padding counts for the default positions
    outs = []
    for rewinds in (False, True):
        cache = layer.new_cache(2)
        layer(hidden[:, :6], attention_mask=mask, cache=cache)
        if rewinds:
            cache.rewind(4)
        outs.append(layer(hidden[:, 6:], cache=cache))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
