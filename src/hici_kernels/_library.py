"""The torch.library namespace ``hici`` and the pattern every operation registers with.

One opaque operation per direction: ``hici::<op>`` and ``hici::<op>_backward``. The implementation is chosen inside
the operation, where tensors are real, so that tracing never sees the choice and compiled graphs do not depend on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIB = torch.library.Library("hici", "DEF")
_KERNELS: dict[Any, Callable[..., Any]] = {}
AUTOCAST = ("cpu", "cuda", "xpu")
PLAIN = frozenset((type(None), bool, int, float, str))


def register(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``hici::<name><schema>`` with one kernel for all devices and its shape function; return the overload.

    Outputs are contiguous whatever the implementation returns, so that shape functions need no stride rules. They must
    not be views of inputs.
    """

    def contiguous(*arguments: Any) -> Any:
        if torch._C._is_any_autocast_enabled():
            with _autocast_off(arguments):
                result = kernel(*arguments)
        else:
            result = kernel(*arguments)
        if isinstance(result, Tensor):
            return result.contiguous()
        if all(map(Tensor.is_contiguous, result)):
            return result
        return type(result)(x.contiguous() for x in result)

    LIB.define(f"{name}{schema}")
    LIB.impl(name, contiguous, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hici::{name}", fake, lib=LIB)
    operation = getattr(torch.ops.hici, name).default
    _KERNELS[operation] = contiguous
    return operation


def call(operation: Any, *arguments: Any) -> Any:
    """``operation(*arguments)``, past the dispatcher where nobody could tell the difference.

    On the CPU the dispatcher takes a third of a small call's time. It is needed by whoever watches or changes calls:
    autograd, compilers, tracers, profilers, transforms, modes and tensor subclasses.

    Raises:
        NotImplementedError: under forward-mode differentiation and torch.func.grad, which torch would answer with zeros
            and with an error about its own classes.
    """
    if torch.compiler.is_compiling():
        return operation(*arguments)
    graded = torch.is_grad_enabled()
    if _unwatched() and _ordinary(arguments, graded):
        return _KERNELS[operation](*arguments)
    _check_transforms(operation, arguments)
    if graded:
        return operation(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operation(*arguments)


def _ordinary(arguments: Sequence[Any], graded: bool) -> bool:
    """Plain numbers, and no tensor that the dispatcher treats in a way of its own; with ``graded``, autograd too."""
    for x in arguments:
        kind = type(x)
        if kind is Tensor:
            # values that are still to be negated, or known to be zero, are not in memory
            if not x.is_cpu or (graded and x.requires_grad) or x.is_neg() or x._is_zerotensor():
                return False
        elif kind not in PLAIN and not (kind in (list, tuple) and _ordinary(x, graded)):
            return False
    return True


def _unwatched() -> bool:
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def _check_transforms(operation: Any, arguments: Sequence[Any]) -> None:
    for x in arguments:
        if isinstance(x, (list, tuple)):
            _check_transforms(operation, x)
        while isinstance(x, Tensor):
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
            # outside the transforms requires_grad is reverse mode's, which is served
            tracked = x.requires_grad and torch._C._functorch.is_gradtrackingtensor(x)
            if tracked or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None):
                raise NotImplementedError(
                    f"{operation.name()} is differentiable by torch.autograd in reverse mode only: forward-mode "
                    "differentiation, torch.func.jvp and torch.func.grad are not supported"
                )
            if not wrapped:
                break
            x = torch._C._functorch.get_unwrapped(x)


def _autocast_off(arguments: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """The caller has cast what autocast casts; inside, it would lower the float32 sums of a kernel's own products."""
    flat = (y for x in arguments for y in (x if isinstance(x, (list, tuple)) else (x,)))
    kind = next((x.device.type for x in flat if isinstance(x, Tensor)), "cpu")
    if kind in AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Attach the gradient formula of ``hici::<name>`` and make a second differentiation an error, not a silence."""

    def once(ctx: Any, *grads: Tensor) -> Any:
        # create_graph=True: what this returns would silently be a constant of the second derivative
        if torch.is_grad_enabled():
            raise RuntimeError(f"hici::{name} is differentiable once: create_graph=True is not supported")
        return backward(ctx, *grads)

    torch.library.register_autograd(f"hici::{name}", once, setup_context=setup_context, lib=LIB)


@contextlib.contextmanager
def _autograd_visible() -> Iterator[None]:
    """Let autograd record inside an operation: compiled graphs run operations with its dispatch keys switched off."""
    keys = torch._C.DispatchKey
    with contextlib.ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def vjp(formula: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of ``formula(*inputs)`` by autograd, one per input; an absent input gives an empty tensor."""
    with torch.enable_grad(), _autograd_visible():
        leaves: list[Tensor | None] = [None if x is None else x.detach().requires_grad_() for x in inputs]
        outputs = formula(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        wanted = [x for x in leaves if x is not None]
        found: Iterator[Tensor | None] = iter([None] * len(wanted))
        if pairs and wanted:
            found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    like = next(x for x in inputs if x is not None)
    result: list[Tensor] = []
    storages: set[int] = set()
    for x in inputs:
        if x is None:
            result.append(like.new_empty(0))
            continue
        g = next(found)
        g = torch.zeros_like(x) if g is None else g
        if g.untyped_storage().data_ptr() in storages:  # autograd may hand out one tensor for two inputs
            g = g.clone(memory_format=torch.contiguous_format)
        storages.add(g.untyped_storage().data_ptr())
        result.append(g)
    return tuple(result)


def fake_gradients(inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Shapes of what :func:`vjp` returns."""
    like = next(x for x in inputs if x is not None)
    return tuple(like.new_empty(0) if x is None else like.new_empty(x.shape) for x in inputs)


def drop_absent(inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Replace the placeholder of an absent input by None, as autograd expects it."""
    return tuple(None if x is None else g for x, g in zip(inputs, gradients, strict=True))
