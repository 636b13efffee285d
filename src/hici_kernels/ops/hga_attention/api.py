"""hga_attention: the public function."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

from torch import Tensor

from ... import _checks
from ..._dispatch import check_impl
from ..._library import call
from ...config import HGAConfig
from ...rope import Rope
from ..hga_route.api import budgets, check_config, check_positions, pad_routes
from ..hga_summaries.api import check_rope
from .op import attention_forward


class HGAResult(NamedTuple):
    """out [B, T, Hq, D]; lse [B, Hq, T] and routes int32 [B, T, Hq, topk_groups], None unless asked for."""

    out: Tensor
    lse: Tensor | None
    routes: Tensor | None


@overload
def hga_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: HGAConfig,
    *,
    rope: Rope,
    positions: Tensor | None = ...,
    attention_mask: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    return_routes: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...
@overload
def hga_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: HGAConfig,
    *,
    rope: Rope,
    positions: Tensor | None = ...,
    attention_mask: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    return_routes: bool = ...,
    impl: str | None = ...,
) -> HGAResult: ...
@overload
def hga_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: HGAConfig,
    *,
    rope: Rope,
    positions: Tensor | None = ...,
    attention_mask: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: bool = ...,
    return_routes: Literal[True],
    impl: str | None = ...,
) -> HGAResult: ...
def hga_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: HGAConfig,
    *,
    rope: Rope,
    positions: Tensor | None = None,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_routes: bool = False,
    impl: str | None = None,
) -> Tensor | HGAResult:
    """Exact attention of every query to the tokens that its route shows it.

    Formula (HGA, arXiv 2606.30709), for query t at index p, n = p // C, f and l as in :func:`hga_route`:
        J_t   = tokens [0, f C) + tokens of the opened groups + tokens [l C, p]
        lse_t = log sum_{j in J_t} exp(scale q_t . k_j)
        out_t = sum_{j in J_t} exp(scale q_t . k_j - lse_t) v_j
    The opened groups are :func:`hga_route` of q over :func:`hga_summaries` of the closed chunks before n.

    Args:
        q: [B, T, Hq, D], roped. T <= S: by default the queries are the last T tokens.
        k, v: [B, S, Hkv, D], k roped, Hq a multiple of Hkv. Any strides with a contiguous last dim.
        config: :class:`HGAConfig`. routing "strict" and "prefix" leak nothing: out[t] depends on nothing after t.
            "block" leaks: the route of t depends on later queries of its block. With T < S, "prefix" maxima and
            "block" blocks start at the first query of this call.
        rope: of the keys.
        positions: int [B, T], index of each query among the unmasked tokens of its row; for "prefix" and "block" they
            must increase along t. A query sees tokens up to its own index, later ones never. An index that the row does
            not have (negative, or not below its number of tokens) gives a query that sees nothing. Contents are not
            checked. Default: the last T.
        attention_mask: [B, S], nonzero = token, any pattern; its last T columns are those of the queries. Masked
            tokens take no place, so that a padded row equals the row alone; masked queries give 0.
        scale: default D ** -0.5. It never enters the routes.
        return_lse, return_routes: return an :class:`HGAResult` with these fields filled.
        impl: implementation name, or None for the fastest that serves the call.

    Returns:
        out [B, T, Hq, D] in q.dtype, or HGAResult(out, lse, routes): lse [B, Hq, T], natural logarithm, float32
        (float64 for float64); routes as of :func:`hga_route`. A query that sees nothing gives 0, -inf, -1 and gradient
        0. What is not seen may hold NaN. Differentiable once in q, k, v, through out and lse, with routes held fixed.
        Sums are kept in float32 at least. Deterministic. float32, bfloat16, float16, float64. Under torch.autocast, q,
        k, v are cast to the autocast dtype. Packed documents, dropout and biases: unsupported.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    q, k, v = _checks.autocast(q, k, v)  # type: ignore[assignment]
    check_config(config)
    _checks.qkv(q, k, v)
    b, t, _, d = q.shape
    s = k.shape[1]
    if t > s:
        raise ValueError(f"q must have at most as many positions as k ({s}), got {t}")
    check_rope(rope, d)
    check_positions(positions, q)
    if attention_mask is not None:
        _checks.token_mask("attention_mask", attention_mask, b, s, q.device)
    if scale is None:
        scale = d**-0.5
    else:
        _checks.number("scale", scale)
    _checks.boolean("return_lse", return_lse)
    _checks.boolean("return_routes", return_routes)
    out, lse, routes = call(
        attention_forward,
        q,
        k,
        v,
        rope.frequencies(q.device),
        positions,
        attention_mask,
        None,
        config.group_size,
        *budgets(config),
        float(scale),
        check_impl(impl),
    )
    if not return_lse and not return_routes:
        return out
    return HGAResult(out, lse if return_lse else None, pad_routes(routes, config) if return_routes else None)
