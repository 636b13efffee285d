"""The interpreter without work that it repeats: the same numbers, sooner.

Triton interprets every reduction it has no numpy function for by one call per element; the exclusive or inside
``tl.sort`` and ``tl.topk`` is one of those, a running maximum another. And it looks through the whole language, to
replace what must be interpreted, at every call of a function by a kernel; once a function and launch is enough.
"""

import contextlib
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_reduce = interpreter.ReduceOps.apply_impl
_scan = interpreter.ScanOps.apply_impl
_launch = interpreter.GridExecutor.__call__
_call = interpreter.InterpretedFunction.__call__
_prepared = set()


def reduced(self, input):
    if self.combine_fn is tl.standard._xor_combine:
        data = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, input[0].dtype)
    return _reduce(self, input)


def scanned(self, input):
    if self.combine_fn is tl.standard._elementwise_max and not self.reverse:
        return [self.to_tensor(np.maximum.accumulate(input[0].handle.data, axis=self.axis), input[0].dtype)]
    return _scan(self, input)


def launched(self, *arguments, **options):
    _prepared.clear()  # a launch takes back what was replaced for it
    return _launch(self, *arguments, **options)


def called(self, *arguments, **options):
    if self.fn not in _prepared:
        _prepared.add(self.fn)
        return _call(self, *arguments, **options)
    try:
        return self.rewrite()(*arguments, **options)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@contextlib.contextmanager
def quick():
    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launched),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", called),
        mock.patch.object(interpreter.ReduceOps, "apply_impl", reduced),
        mock.patch.object(interpreter.ScanOps, "apply_impl", scanned),
    ):
        yield
