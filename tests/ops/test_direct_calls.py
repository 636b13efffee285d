"""Without gradients CPU operations go past the dispatcher, unless somebody watches or changes calls."""

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hici_kernels import attention, merge_attention
from hici_kernels.ops.merge_attention.op import merge_forward


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A subclass that counts the operations it meets."""

    met: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, strides=x.stride())

    def __init__(self, x):
        self.inner = x

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(x):
            if isinstance(x, (list, tuple)):
                return type(x)(map(plain, x))
            return x.inner if isinstance(x, cls) else x

        cls.met.append(str(func))
        return func(*map(plain, args), **(kwargs or {}))


def tensors():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 5, 2, 16, generator=g) for _ in range(3)]


def test_a_mode_sees_the_operation():
    with torch.no_grad(), Seen() as seen:
        attention(*tensors())
    assert any("hici.attention" in name for name in seen.names)


def test_a_profiler_sees_the_operation():
    with torch.no_grad(), torch.profiler.profile() as found:
        attention(*tensors())
    assert any(event.key == "hici::attention" for event in found.key_averages())


def test_a_subclass_sees_the_operation_even_in_a_list():
    q, k, v = tensors()
    with torch.no_grad():
        out, lse = attention(q, k, v, return_lse=True)
        Tagged.met.clear()
        merged, _ = merge_attention([Tagged(out), out], [lse, lse])
    assert any("hici.merge" in name for name in Tagged.met)
    torch.testing.assert_close(merged, out)
    assert "merge" in str(merge_forward)


def test_gradients_still_flow_where_they_are_on():
    leaves = [x.requires_grad_() for x in tensors()]
    attention(*leaves).sum().backward()
    assert all(x.grad is not None for x in leaves)
    with torch.no_grad():
        assert not attention(*leaves).requires_grad
    with torch.inference_mode():
        assert attention(*leaves).is_inference()


def test_results_are_the_same_bits_either_way():
    with torch.no_grad():
        short = attention(*tensors())
        with Seen():
            long = attention(*tensors())
    assert torch.equal(short, long)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_holds_on_the_short_way(dtype):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*[x.to(dtype) for x in tensors()]).dtype == torch.bfloat16


def test_with_gradients_on_only_what_requires_them_is_recorded():
    q, k, v = tensors()
    assert torch.equal(attention(q, k, v), attention(q.requires_grad_(), k, v).detach())
    assert attention(q, k, v).requires_grad and not attention(q.detach(), k, v).requires_grad
