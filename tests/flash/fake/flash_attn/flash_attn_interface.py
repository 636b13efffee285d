"""The two functions hici_kernels uses of flash_attn 2.7 and newer, by plain loops over sequences in float32 or wider.

Same argument names, layouts and meanings: q [total_q, Hq, D], k and v [total_k, Hkv, D], lse [Hq, total_q] natural
logarithm, gradients written into dq, dk, dv; the backward trusts the lse and out it is given. What the real kernels
read without looking (uncovered rows, keys of an empty sequence) is left poisoned.
"""

import torch

calls: list[dict] = []


def _wide(x):
    return x.double() if x.dtype == torch.float64 else x.float()


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    assert q.ndim == k.ndim == v.ndim == 3 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and q.shape[2] == k.shape[2]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    assert cu_seqlens_q.shape == cu_seqlens_k.shape
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q and int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    assert int(cu_seqlens_q[-1]) == q.shape[0] and int(cu_seqlens_k[-1]) == k.shape[0]


def _spans(cu_seqlens_q, cu_seqlens_k):
    a, b = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(a) - 1):
        yield slice(a[i], a[i + 1]), slice(b[i], b[i + 1])


def _scores(q, k, scale, causal):
    """[Hq, t, n]; causal is aligned to the last row and column."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("thd,nhd->htn", _wide(q), _wide(k)) * scale
    t, n = s.shape[1:]
    if causal:
        s = s.masked_fill(~torch.ones(t, n, dtype=torch.bool).tril(n - t), -torch.inf)
    return s


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
):
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    calls.append({"k": k.data_ptr(), "v": v.data_ptr(), "causal": causal})
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=_wide(q).dtype)
    for rows, keys in _spans(cu_seqlens_q, cu_seqlens_k):
        s = _scores(q[rows], k[keys], softmax_scale, causal)
        lse[:, rows] = torch.logsumexp(s, -1)
        values = _wide(v[keys]).repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("htn,nhd->thd", torch.softmax(s, -1), values).to(q.dtype)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert dout.shape == out.shape == q.shape == dq.shape and dk.shape == dv.shape == k.shape
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and deterministic
    for x in (dq, dk, dv):
        x.fill_(torch.nan)
    group = q.shape[1] // k.shape[1]
    for rows, keys in _spans(cu_seqlens_q, cu_seqlens_k):
        g, o = _wide(dout[rows]), _wide(out[rows])
        wide_k, wide_v = (_wide(x[keys]).repeat_interleave(group, 1) for x in (k, v))
        s = _scores(q[rows], k[keys], softmax_scale, causal)
        p = torch.exp(s - softmax_lse[:, rows, None])
        delta = (g * o).sum(-1).T[..., None]
        ds = p * (torch.einsum("thd,nhd->htn", g, wide_v) - delta)
        dq[rows] = (softmax_scale * torch.einsum("htn,nhd->thd", ds, wide_k)).to(dq.dtype)
        for target, weights, source in ((dk, softmax_scale * ds, _wide(q[rows])), (dv, p, g)):
            found = torch.einsum("htn,thd->nhd", weights, source)
            target[keys] = found.unflatten(1, (-1, group)).sum(2).to(target.dtype)
    return torch.empty(0)
