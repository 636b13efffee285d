"""Loop oracle of the HiCI contract: one row, one query, one explicit list of visible keys at a time, in float64.

It shares nothing with the package (no masks, no segment tables, no batched formula) so that an error has to be made
twice, in two different shapes, to pass unseen. Everything is differentiable, so gradients come from autograd through
the same loops.
"""

import itertools
import math

import torch

LEAK_FREE = ("causal_shift", "causal_shift_g")
MODES = ("none", "causal_gi", "causal_shift", "causal_shift_g", "causal_gi_gonly")


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def documents(length, cu_seqlens):
    if cu_seqlens is None:
        return [(0, length)]
    ends = [int(x) for x in cu_seqlens]
    return list(itertools.pairwise(ends))


def attend_query(q, keys, values, scale):
    """q [Hq,D]; keys and values: lists of [Hkv,D]. Returns out [Hq,Dv], lse [Hq]."""
    heads = q.shape[0]
    if not keys:
        return q.new_zeros(heads, q.shape[1]), q.new_full((heads,), -math.inf)
    k, v = torch.stack(keys), torch.stack(values)
    group = heads // k.shape[1]
    outs, lses = [], []
    for h in range(heads):
        scores = (k[:, h // group] @ q[h]) * scale
        lse = torch.logsumexp(scores, 0)
        outs.append(torch.exp(scores - lse) @ v[:, h // group])
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def attention_row(q, k, v, *, segments, slots, recurrence_len, tokens, causal, scale):
    """q [T,Hq,D] are the last T of the S positions of k, v [S,Hkv,D].

    segments: list of (columns, document) in order; slots: per segment a list of (key, value) pairs; tokens: set of
    unmasked columns.
    """
    first = k.shape[0] - q.shape[0]
    place = {c: i for i, (columns, _) in enumerate(segments) for c in columns}
    outs, lses = [], []
    for t in range(q.shape[0]):
        c = first + t
        keys, values = [], []
        if c in tokens and c in place:
            i = place[c]
            for key, value in slots[i]:
                keys.append(key)
                values.append(value)
            seen = []
            if i > 0 and segments[i - 1][1] == segments[i][1] and recurrence_len:
                seen += segments[i - 1][0][-recurrence_len:]
            seen += [x for x in segments[i][0] if x <= c or not causal]
            for x in seen:
                if x in tokens:
                    keys.append(k[x])
                    values.append(v[x])
        out, lse = attend_query(q[t], keys, values, scale)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return q.new_zeros(q.shape), q.new_zeros(q.shape[1], 0)
    return torch.stack(outs), torch.stack(lses, 1)


def column_segments(length, segment_len, cu_seqlens=None):
    found = []
    for d, (a, b) in enumerate(documents(length, cu_seqlens)):
        for columns in chunks(list(range(a, b)), segment_len or max(b - a, 1)):
            found.append((columns, d))
    return found


def attention(
    q,
    k,
    v,
    *,
    segment_len=None,
    recurrence_len=0,
    global_k=None,
    global_v=None,
    local_k=None,
    local_v=None,
    prefix_mask=None,
    attention_mask=None,
    cu_seqlens=None,
    causal=True,
    scale=None,
):
    """The op's contract. Returns out [B,T,Hq,D], lse [B,Hq,T]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    segments = column_segments(k.shape[1], segment_len, cu_seqlens)
    outs, lses = [], []
    for b in range(q.shape[0]):
        tokens = set(range(k.shape[1]))
        if attention_mask is not None:
            tokens = {c for c in tokens if bool(attention_mask[b, c])}
        slots = []
        for i in range(len(segments)):
            mine = []
            shown = True
            if prefix_mask is not None:
                shown = bool(prefix_mask[i] if prefix_mask.dim() == 1 else prefix_mask[b, i])
            if shown and global_k is not None:
                gk, gv = (global_k[b], global_v[b]) if global_k.dim() == 4 else (global_k[b, i], global_v[b, i])
                mine += [(gk[s], gv[s]) for s in range(gk.shape[0])]
            if shown and local_k is not None:
                mine += [(local_k[b, i, s], local_v[b, i, s]) for s in range(local_k.shape[2])]
            slots.append(mine)
        out, lse = attention_row(
            q[b],
            k[b],
            v[b],
            segments=segments,
            slots=slots,
            recurrence_len=recurrence_len,
            tokens=tokens,
            causal=causal,
            scale=scale,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        return q.new_zeros(q.shape), q.new_zeros(0, q.shape[2], q.shape[1])
    return torch.stack(outs), torch.stack(lses)


def slots_of(hidden, columns, tokens, slot_queries, k_weight, v_weight, heads, empty):
    """Slot vectors [M,E] of one segment of one row; None where `empty` says the segment has none."""
    m, e = slot_queries.shape
    d = e // heads
    kept = [c for c in columns if c in tokens]
    if not kept:
        if empty == "uniform" and columns:
            return torch.stack([torch.stack([v_weight @ hidden[c] for c in columns]).mean(0)] * m)
        return None if empty == "skip" else hidden.new_zeros(m, e)
    keys = torch.stack([k_weight @ hidden[c] for c in kept])
    values = torch.stack([v_weight @ hidden[c] for c in kept])
    rows = []
    for s in range(m):
        parts = []
        for h in range(heads):
            at = slice(h * d, (h + 1) * d)
            weights = torch.softmax(keys[:, at] @ slot_queries[s, at] / math.sqrt(d), 0)
            parts.append(weights @ values[:, at])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def local_slots(
    hidden,
    slot_queries,
    k_weight,
    v_weight,
    *,
    num_heads,
    segment_len=None,
    attention_mask=None,
    cu_seqlens=None,
    empty="zero",
):
    segments = column_segments(hidden.shape[1], segment_len, cu_seqlens)
    rows = []
    for b in range(hidden.shape[0]):
        tokens = set(range(hidden.shape[1]))
        if attention_mask is not None:
            tokens = {c for c in tokens if bool(attention_mask[b, c])}
        per = [
            slots_of(hidden[b], columns, tokens, slot_queries, k_weight, v_weight, num_heads, empty)
            for columns, _ in segments
        ]
        rows.append(torch.stack(per) if per else hidden.new_zeros(0, *slot_queries.shape))
    return torch.stack(rows) if rows else hidden.new_zeros(0, len(segments), *slot_queries.shape)


def statistics(x):
    """The five views [5,H] of slot rows x [n,H]."""
    mean = x.mean(0)
    std = ((x - mean) ** 2).mean(0)
    std = torch.where(std > 1e-12, torch.where(std > 1e-12, std, 1.0).sqrt(), 1e-6)
    norm = (mean * mean).sum()
    norm = torch.where(norm > 1e-12, torch.where(norm > 1e-12, norm, 1.0).sqrt(), 1e-6)
    return torch.stack([mean, x.max(0).values, x.min(0).values, std, mean / norm])


def layer_norm(x, weight, bias, eps=1e-5):
    x = x - x.mean()
    return x / torch.sqrt((x * x).mean() + eps) * weight + bias


def integrate(x, p, heads):
    """G [K,H] from all slot rows x [n,H]; p: the integrator's parameters by their published names."""
    views = statistics(x)
    rows = []
    for i in range(5):
        if "shared_compressor.0.weight" in p:
            z = layer_norm(
                p["shared_compressor.0.weight"] @ views[i],
                p["shared_compressor.1.weight"],
                p["shared_compressor.1.bias"],
            )
            if "stat_expand.0.weight" in p:
                z = layer_norm(p["stat_expand.0.weight"] @ z, p["stat_expand.1.weight"], p["stat_expand.1.bias"])
        else:
            at = f"stat_compressors.{i}."
            z = layer_norm(p[at + "0.weight"] @ views[i], p[at + "1.weight"], p[at + "1.bias"])
        rows.append(z)
    width = rows[0].shape[0]
    d = width // heads
    scale = torch.log1p(torch.exp(p["expand_scale_param"]))
    found = []
    for s in range(p["global_queries"].shape[0]):
        query = p["q_proj.weight"] @ p["global_queries"][s]
        parts = []
        for h in range(heads):
            at = slice(h * d, (h + 1) * d)
            scores = torch.stack([(p["k_proj.weight"] @ z)[at] @ query[at] for z in rows]) / math.sqrt(d)
            weights = torch.softmax(scores, 0)
            parts.append(sum(w * (p["v_proj.weight"] @ z)[at] for w, z in zip(weights, rows, strict=True)))
        found.append(scale * (p["expand.weight"] @ (p["o_proj.weight"] @ torch.cat(parts))))
    return torch.stack(found)


def rotate(x, position, inv_freq, scaling=1.0):
    """Rotate-half RoPE of x [heads, D] at one position; the rotated part comes first."""
    half = inv_freq.shape[0]
    angle = inv_freq.to(x.dtype) * float(position)
    cos, sin = torch.cos(angle) * scaling, torch.sin(angle) * scaling
    a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], 1)


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


class Layer:
    """The whole layer, from a state dict of float64 tensors with the published names."""

    def __init__(self, state, config, *, num_heads, num_kv_heads, head_dim, inv_freq, qk_norm_eps=None):
        self.p = dict(state)
        self.c = config
        self.hq, self.hkv, self.d = num_heads, num_kv_heads, head_dim
        self.inv_freq = inv_freq.double()
        self.eps = qk_norm_eps

    def sub(self, prefix):
        return {name[len(prefix) :]: value for name, value in self.p.items() if name.startswith(prefix)}

    def project(self, x, position):
        q = (self.p["q_proj.weight"] @ x).view(self.hq, self.d)
        k = (self.p["k_proj.weight"] @ x).view(self.hkv, self.d)
        v = (self.p["v_proj.weight"] @ x).view(self.hkv, self.d)
        if self.eps is not None:
            q, k = rms(q, self.p["q_norm.weight"], self.eps), rms(k, self.p["k_norm.weight"], self.eps)
        return rotate(q, position, self.inv_freq), rotate(k, position, self.inv_freq), v

    def slot_pairs(self, slots):
        pairs = []
        for slot in slots:
            k = (self.p["k_proj.weight"] @ slot).view(self.hkv, self.d)
            v = (self.p["v_proj.weight"] @ slot).view(self.hkv, self.d)
            pairs.append((k, v))
        return pairs

    def integrator_heads(self):
        return self.c.num_heads if self.c.integrator_heads is None else self.c.integrator_heads

    def local(self, hidden, columns, tokens):
        lc = self.sub("local_constructor.")
        queries = lc["memory_slots"] @ lc["q_proj.weight"].T
        found = slots_of(
            hidden, columns, tokens, queries, lc["k_proj.weight"], lc["v_proj.weight"], self.c.num_heads, self.c.empty
        )
        if found is not None and "o_proj.weight" in lc:
            found = found @ lc["o_proj.weight"].T
        return found

    def document_segments(self, columns, tokens):
        if self.c.cut == "token":
            columns = [c for c in columns if c in tokens]
        size = self.c.segment_len or math.ceil(len(columns) / self.c.num_segments)
        return chunks(columns, size) if columns else []

    def slots(self, hidden, tokens, segments):
        """Per segment the list of slot vectors its queries see, plus (G over everything, all local slots)."""
        c = self.c
        nothing = [[] for _ in segments], ([], [])
        if not (c.use_global or c.use_local) or (len(segments) == 1 and c.single_segment == "off"):
            return nothing
        local = [self.local(hidden, columns, tokens) for columns in segments]

        def aggregate(upto):
            rows = [x for x in local[:upto] if x is not None]
            return (
                list(integrate(torch.cat(rows), self.sub("global_integrator."), self.integrator_heads()))
                if rows
                else []
            )

        uses_local = c.use_local and not c.context_mode.endswith(("_g", "gonly"))
        whole = aggregate(len(local)) if c.use_global else []
        seen = []
        for i in range(len(segments)):
            mine = []
            if c.context_mode in LEAK_FREE:
                before = [x for x in local[:i] if x is not None]
                if before:
                    mine += aggregate(i) if c.use_global else []
                    mine += list(before[-1]) if uses_local else []
            else:
                if c.use_global and c.context_mode == "none":
                    mine += whole
                elif c.use_global:
                    mine += aggregate(i + 1)
                if uses_local and local[i] is not None:
                    mine += list(local[i])
            seen.append(mine)
        everything = [s for x in local if x is not None for s in x] if uses_local else []
        return seen, (whole, everything)

    def row(self, hidden, *, mask=None, positions=None, cu_seqlens=None):
        """hidden [S,H] -> [S,H]."""
        length = hidden.shape[0]
        tokens = {c for c in range(length) if mask is None or bool(mask[c])}
        outs = [hidden.new_zeros(hidden.shape[1]) for _ in range(length)]
        for a, b in documents(length, cu_seqlens):
            segments = self.document_segments(list(range(a, b)), tokens)
            seen, _ = self.slots(hidden, tokens, segments)
            place = {c: c - a if positions is None else int(positions[c]) for c in range(a, b)}
            qkv = {c: self.project(hidden[c], place[c]) for c in range(a, b) if c in tokens}
            occupied = [i for i, columns in enumerate(segments) if any(c in tokens for c in columns)]
            for i, columns in enumerate(segments):
                pairs = self.slot_pairs(seen[i])
                previous = i - 1
                if self.c.empty == "skip":
                    earlier = [j for j in occupied if j < i]
                    previous = earlier[-1] if earlier else -1
                carried = (
                    segments[previous][-self.c.recurrence_len :] if previous >= 0 and self.c.recurrence_len else []
                )
                for c in columns:
                    if c in tokens:
                        visible = [x for x in carried if x in tokens] + [x for x in columns if x <= c and x in tokens]
                        outs[c] = self.output(qkv[c][0], pairs, [qkv[x][1:] for x in visible])
        return torch.stack(outs) if outs else hidden.new_zeros(hidden.shape)

    def output(self, q, pairs, seen):
        out, _ = attend_query(q, [k for k, _ in pairs + seen], [v for _, v in pairs + seen], self.d**-0.5)
        return self.p["o_proj.weight"] @ out.reshape(-1)

    def batch(self, hidden, *, mask=None, positions=None, cu_seqlens=None):
        rows = []
        for b in range(hidden.shape[0]):
            p = None
            if positions is not None:
                p = positions if positions.dim() == 1 else positions[b]
            rows.append(self.row(hidden[b], mask=None if mask is None else mask[b], positions=p, cu_seqlens=cu_seqlens))
        return torch.stack(rows)

    def decode(self, hidden, calls, *, mask=None, positions=None):
        """One row read in calls of the given lengths, by the config's decode rule. Returns [S,H]."""
        if self.c.decode == "segment":
            return self.row(hidden, mask=mask, positions=positions)
        length = hidden.shape[0]
        tokens = {c for c in range(length) if mask is None or bool(mask[c])}
        prompt = calls[0]
        cut = None if mask is None else mask[:prompt]
        outs = list(self.row(hidden[:prompt], mask=cut, positions=positions))
        kept = []
        if self.c.decode == "slots":
            inside = {c for c in tokens if c < prompt}
            segments = self.document_segments(list(range(prompt)), inside)
            _, (whole, everything) = self.slots(hidden, inside, segments)
            kept = self.slot_pairs(whole + everything)
        qkv = {}
        for c in sorted(tokens):
            qkv[c] = self.project(hidden[c], c if positions is None else int(positions[c]))
        for c in range(prompt, length):
            if c in tokens:
                outs.append(self.output(qkv[c][0], kept, [qkv[x][1:] for x in sorted(tokens) if x <= c]))
            else:
                outs.append(hidden.new_zeros(hidden.shape[1]))
        return torch.stack(outs)
