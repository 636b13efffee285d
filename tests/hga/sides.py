"""The implementations that every property is tried on. A new one joins by its line in SIDES."""

from __future__ import annotations

from typing import NamedTuple

import hga_cases
import torch
from torch import Tensor

from hici_kernels import HGAConfig, _dispatch
from hici_kernels.kv.store import KVStore
from hici_kernels.ops.hga_attention.api import HGAResult, hga_attention
from hici_kernels.ops.hga_attention.op import attention_forward
from hici_kernels.ops.hga_route.api import budgets, hga_route
from hici_kernels.ops.hga_summaries.api import hga_summaries


class Side(NamedTuple):
    """An implementation, the widest dtype it serves, and how close its results of order 1 come to another order of
    the same additions. It gives the same bits whatever a call holds beside a query, or only the same to 2e-6."""

    impl: str
    dtype: torch.dtype
    near: float
    exact: bool

    def tensors(self, s: int, **rest: object) -> tuple[Tensor, Tensor, Tensor]:
        return hga_cases.tensors(s, **{"dtype": self.dtype, **rest})  # type: ignore[arg-type]

    def full(self, q: Tensor, k: Tensor, v: Tensor, config: HGAConfig, **rest: object) -> HGAResult:
        return hga_cases.full(q, k, v, config, impl=self.impl, **rest)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, config: HGAConfig, **rest: object) -> Tensor:
        out = hga_attention(q, k, v, config, impl=self.impl, **rest)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out

    def route(self, *tensors: object, **rest: object) -> Tensor:
        return hga_route(*tensors, impl=self.impl, **rest)  # type: ignore[arg-type]

    def summaries(self, k: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        return hga_summaries(k, impl=self.impl, **rest)  # type: ignore[arg-type]

    def routed(
        self, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, config: HGAConfig, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, routes) with the routes given."""
        given = (torch.ones(1), None, None, routes, config.group_size, *budgets(config), scale)
        return attention_forward(q, k, v, *given, self.impl)

    def feed(self, target: KVStore, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
        return hga_cases.feed(target, q, k, v, cuts, impl=self.impl)

    def close(self, actual: Tensor, expected: Tensor, atol: float = 0.0) -> None:
        """Equal but for the order of additions, or within ``atol`` where that is more."""
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=0 if self.exact else self.near, atol=max(atol, self.near)
        )

    def same(self, actual: Tensor, expected: Tensor) -> bool:
        """The results of a query from two calls that differ only in what it does not see."""
        if self.exact:
            return torch.equal(actual, expected)
        return torch.allclose(actual, expected, rtol=0, atol=2e-6)


SIDES = [
    Side("reference", torch.float64, 1e-11, exact=True),
    Side("cpu", torch.float32, 1e-5, exact=False),
]


def missing(side: Side) -> str | None:
    """Why a side cannot run on this machine."""
    reasons = (_dispatch.load(op, side.impl)[1] for op in ("hga_summaries", "hga_route", "hga_attention"))
    return next((reason for reason in reasons if reason), None)
