"""Context beyond the window: dual chunk attention, shifted short attention, stretched positions."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
import transformers as hf
from tiny_models import ALL, left_padded, prompt, tiny, worst
from torch import Tensor

from hici_kernels import HGAConfig
from hici_kernels.integrations import (
    DCAConfig,
    apply_dca,
    apply_hga,
    apply_rope_scaling,
    apply_shifted,
    restore,
)
from hici_kernels.rope import Rope

TOLERANCE = 1e-5
CHUNKS = DCAConfig(chunk_len=12, local_len=5)


def oracle(q: Tensor, k: Tensor, v: Tensor, rope: Rope, config: DCAConfig, scale: float) -> Tensor:
    """Pair by pair in float64, from unrotated q [S, Hq, D] and k, v [S, Hkv, D]."""
    q, k, v = q.double(), k.double(), v.double()
    s, heads, _ = q.shape
    c, out = config.chunk_len, torch.zeros_like(q)
    group = heads // k.shape[1]

    def at(x, position):
        return rope.rotate(x[None, None], torch.tensor([position]))[0, 0]

    for t in range(s):
        scores = []
        for j in range(t + 1):
            apart = t // c - j // c
            where = (t % c, min(t % c + c, config.ceiling), config.ceiling)[min(apart, 2)]
            pair = at(q[t], where).unflatten(0, (-1, group)) * at(k[j], j % c)[:, None]
            scores.append(scale * pair.sum(-1).flatten())
        weights = torch.stack(scores).softmax(0)
        values = v[: t + 1].repeat_interleave(group, 1)
        out[t] = (weights[:, :, None] * values).sum(0)
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama-yarn", "stablelm-partial"])
def test_dual_chunk_attention_of_one_layer(family):
    model, s = tiny(family), 45
    attention = model.model.layers[0].self_attn
    hidden, at = torch.randn(1, s, 64), torch.arange(s)[None]
    rotary = model.model.rotary_emb
    rope = Rope(rotary.inv_freq, float(rotary.attention_scaling))
    shape = (s, -1, attention.head_dim)
    with torch.no_grad():
        q, k, v = (getattr(attention, f"{x}_proj")(hidden)[0].view(shape) for x in "qkv")
        if family == "qwen3":
            q, k = attention.q_norm(q), attention.k_norm(k)
        expected = attention.o_proj(oracle(q, k, v, rope, CHUNKS, attention.scaling).flatten(1).float())
        apply_dca(model, CHUNKS)
        found = attention(
            hidden, position_embeddings=rotary(hidden, at), position_ids=at, attention_mask=None, past_key_values=None
        )[0]
    assert worst(found[0], expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dual_chunk_attention_within_one_chunk_is_the_model(family):
    model, (ids, mask) = tiny(family), left_padded(prompt())
    wanted = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True,
              "output_logits": True}  # fmt: skip
    expected = model.generate(ids, **wanted)
    apply_dca(model, DCAConfig(chunk_len=64, local_len=8))
    found = model.generate(ids, **wanted)
    assert torch.equal(found.sequences, expected.sequences) and worst(found, expected) < TOLERANCE
    restore(model)
    assert worst(model.generate(ids, **wanted), expected) == 0


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dual_chunk_decode_is_the_prefill(family, strategy):
    """Through transformers' own cache, across chunk borders, in a left-padded batch."""
    model, (ids, mask) = apply_dca(tiny(family), CHUNKS), left_padded(prompt())
    if "prompt_lookup_num_tokens" in strategy:
        ids, mask = ids[1:], mask[1:]
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **strategy,
    )  # fmt: skip
    whole = torch.cat((mask, mask.new_ones(len(mask), 20)), 1)
    with torch.no_grad():
        full = model(
            out.sequences, attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).logits
    chosen = full[:, 39:-1].argmax(-1)
    if "num_beams" not in strategy:
        assert torch.equal(chosen, out.sequences[:, 40:])
        assert worst(torch.stack(out.logits, 1), full[:, 39:-1]) < TOLERANCE
    alone = ids[:1, 5:] if len(ids) == 2 else ids
    with torch.no_grad():
        row = model(alone, use_cache=False).logits
    assert worst(row, full[:1, 40 - alone.shape[1] : 40]) < TOLERANCE


ROUTED = HGAConfig(chunk_size=4, group_size=2, keep_first=1, keep_last=1, topk_chunks=3, topk_groups=3)


def routed_oracle(q: Tensor, k: Tensor, v: Tensor, rope: Rope, config: DCAConfig, scale: float) -> Tensor:
    """Float64, from the definition: summaries in the frame of their chunk, scores by regime, one softmax over what is
    seen."""
    q, k, v = q.double(), k.double(), v.double()
    s, heads, _ = q.shape
    c, size, per = config.chunk_len, ROUTED.chunk_size, ROUTED.group_size
    group, out = heads // k.shape[1], torch.zeros_like(q)
    turn = Rope(rope.inv_freq)

    def at(x, position, by=rope):
        return by.rotate(x[None, None], torch.tensor([position]))[0, 0]

    keys = torch.stack([at(k[j], j % c) for j in range(s)])

    def summary(begin, count):
        anchor = begin + (count - 1) // 2
        summed = torch.stack([at(keys[j], anchor - j, turn) for j in range(begin, begin + count)]).sum(0)
        turns = (size - 1) * rope.inv_freq.double() > 0.5
        fast = int(turns.nonzero()[-1]) + 1 if bool(turns.any()) else 0
        half, plain = len(rope.inv_freq), keys[begin : begin + count].sum(0)
        slow = torch.zeros(k.shape[-1], dtype=torch.bool)
        slow[fast:half], slow[half + fast : 2 * half] = True, True
        return torch.where(slow, summed, plain) / count

    for t in range(s):
        n = t // size
        first, last = min(1, n), max(min(1, n), n - 1)

        def query(j, t=t):
            where = (t % c, min(t % c + c, config.ceiling), config.ceiling)[min(t // c - j // c, 2)]
            return at(q[t], where)

        for h in range(heads):
            kv = h // group
            score = {x: float(query(x * size)[h] @ summary(x * size, size)[kv]) for x in range(first, last)}
            best = sorted(score, key=score.get, reverse=True)[: ROUTED.topk_chunks]
            inner = {
                (x, m): float(query(x * size)[h] @ summary(x * size + m * per, per)[kv])
                for x in best
                for m in range(size // per)
            }
            opened = sorted(inner, key=inner.get, reverse=True)[: ROUTED.topk_groups]
            seen = [*range(first * size), *range(last * size, t + 1)]
            seen += [x * size + m * per + i for x, m in opened for i in range(per)]
            weights = torch.stack([scale * (query(j)[h] @ keys[j, kv]) for j in seen]).softmax(0)
            out[t, h] = weights @ v[seen, kv]
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_routed_dual_chunk_attention_of_one_layer(family):
    model, s = tiny(family), 45
    attention = model.model.layers[0].self_attn
    hidden, at = torch.randn(1, s, 64), torch.arange(s)[None]
    rotary = model.model.rotary_emb
    shape = (s, -1, attention.head_dim)
    with torch.no_grad():
        q, k, v = (getattr(attention, f"{x}_proj")(hidden)[0].view(shape) for x in "qkv")
        if family == "qwen3":
            q, k = attention.q_norm(q), attention.k_norm(k)
        heads = routed_oracle(q, k, v, Rope(rotary.inv_freq), CHUNKS, attention.scaling)
        expected = attention.o_proj(heads.flatten(1).float())
        apply_dca(model, CHUNKS, routing=ROUTED)
        found = attention(hidden, position_embeddings=rotary(hidden, at), position_ids=at, attention_mask=None)[0]
    assert worst(found[0], expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3", "stablelm-partial"])
def test_routed_dual_chunk_attention(family):
    """Covering budgets: dual chunk attention. Within one chunk: apply_hga. Decode: the prefill."""
    model, (ids, mask) = tiny(family), left_padded(prompt())
    at = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": at, "use_cache": False}
    everything = HGAConfig(chunk_size=4, group_size=4, topk_chunks=99, topk_groups=99)
    long = DCAConfig(chunk_len=64, local_len=8)
    with torch.no_grad():
        chunked = apply_dca(model, CHUNKS)(ids, **given).logits
        restore(model)
        covered = apply_dca(model, CHUNKS, routing=everything)(ids, **given).logits
        assert worst(covered[mask.bool()], chunked[mask.bool()]) < TOLERANCE
        restore(model)
        routed = apply_hga(model, ROUTED)(ids, **given).logits
        restore(model)
        short = apply_dca(model, long, routing=ROUTED)(ids, **given).logits
        assert worst(short[mask.bool()], routed[mask.bool()]) < TOLERANCE
        restore(model)
        apply_dca(model, CHUNKS, routing=ROUTED)
        full = model(ids, **given).logits
        assert worst(full, chunked) > 1e-3
        out, parts = None, []
        for begin, end in ((0, 9), (9, 30), *((i, i + 1) for i in range(30, 40))):
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=at[:, begin:end],
                        past_key_values=None if out is None else out.past_key_values)  # fmt: skip
            parts.append(out.logits)
        assert worst(torch.cat(parts, 1)[mask.bool()], full[mask.bool()]) < TOLERANCE
    block = HGAConfig(chunk_size=4, group_size=4, routing="block")
    for wrong, message in ((HGAConfig(chunk_size=8, group_size=4), "must divide"), (block, "strict")):
        with pytest.raises(ValueError, match=message):
            apply_dca(restore(model), CHUNKS, routing=wrong)


def test_dual_chunk_attention_trains():
    model, ids = apply_dca(tiny(), CHUNKS).train(), prompt()
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(worst(p.grad, plain[n]) < TOLERANCE for n, p in model.named_parameters())


def test_holes_between_tokens_are_refused():
    model, ids = apply_dca(tiny(), CHUNKS), prompt()
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="not between them"):
        model(ids, attention_mask=mask)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="chunk_len"):
            DCAConfig(wrong, 4)


@pytest.mark.parametrize("length", [3, 8, 29, 32])
@pytest.mark.parametrize("half", [0, 1])
def test_shifted_short_attention(half, length):
    """Each half of the heads (the other cut off by o_proj) against full attention under that half's mask."""
    model, g = tiny("llama"), 8
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, slice(32, 64) if half == 0 else slice(0, 32)] = 0
    hidden, at = torch.randn(2, length, 64), torch.arange(length)
    embeddings = model.model.rotary_emb(hidden, at[None])
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length // 3] = False
    group = (at + half * g // 2) // g
    seen = (group[:, None] == group) & (at[:, None] >= at)
    seen = (seen & mask[:, None])[:, None]
    expected = attention(hidden, position_embeddings=embeddings, attention_mask=seen)[0]
    apply_shifted(model, g).train()
    found = attention(hidden, position_embeddings=embeddings, attention_mask=mask)[0]
    assert worst(found[mask], expected[mask]) < TOLERANCE


def test_shifted_attention_is_full_attention_when_not_training():
    model, (ids, mask) = tiny("qwen3"), left_padded(prompt())
    wanted = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(ids, **wanted)
    apply_shifted(model, 8)
    assert torch.equal(model.generate(ids, **wanted), expected)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    other = ids.clone()
    other[:, 30] = (other[:, 30] + 1) % 97
    with torch.no_grad():
        a, b = (model(x, use_cache=False).logits for x in (ids, other))
    assert torch.equal(a[:, :30], b[:, :30]) and worst(a[:, 30:], b[:, 30:]) > 1e-3
    with pytest.raises(ValueError, match="group_len must be even"):
        apply_shifted(tiny(), 7)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stretched_positions(kind, family, tmp_path):
    """The frequencies of a model built with the scaling; saved with the model; taken back bit for bit."""
    model, ids = tiny(family), prompt()
    plain, config = model(ids).logits, model.config.to_dict()
    apply_rope_scaling(model, kind, 4.0)
    window = {"original_max_position_embeddings": 512} if kind == "yarn" else {}
    theta = {"rope_theta": config["rope_parameters"]["rope_theta"]}
    built = tiny(family, rope_parameters={"rope_type": kind, "factor": 4.0, **theta, **window})
    built.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, built(ids).logits)
    assert worst(model(ids).logits, plain) > 1e-3
    model.save_pretrained(tmp_path)
    assert worst(hf.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, built(ids).logits) < TOLERANCE
    model.config.architectures, model.config.dtype = None, None
    with pytest.raises(ValueError, match="scaled already"):
        apply_rope_scaling(model, kind, 2.0)
    restore(model)
    assert torch.equal(model(ids).logits, plain)
    assert model.config.rope_parameters == config["rope_parameters"]


def test_stretched_positions_under_routing():
    """HGA reads the frequencies that are there."""
    model, ids = apply_rope_scaling(tiny(), "yarn", 4.0), prompt()
    expected = model(ids).logits
    apply_hga(model, ALL)
    assert worst(model(ids).logits, expected) < TOLERANCE
    restore(model)
    assert model.config.rope_parameters["rope_type"] == "default"
    for wrong, message in (((tiny(), "ntk", 2.0), "kind must be"), ((tiny(), "linear", 0.5), "at least 1")):
        with pytest.raises(ValueError, match=message):
            apply_rope_scaling(*wrong)
