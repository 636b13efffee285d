"""The interpreter's element-by-element reductions and scans that sorting needs, by numpy: the same numbers, sooner.

Triton interprets every reduction it has no numpy function for by one call per element; the exclusive or inside
``tl.sort`` and ``tl.topk`` is one of those, a running maximum another.
"""

import contextlib
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_reduce = interpreter.ReduceOps.apply_impl
_scan = interpreter.ScanOps.apply_impl


def reduced(self, input):
    if self.combine_fn is tl.standard._xor_combine:
        data = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, input[0].dtype)
    return _reduce(self, input)


def scanned(self, input):
    if self.combine_fn is tl.standard._elementwise_max and not self.reverse:
        return [self.to_tensor(np.maximum.accumulate(input[0].handle.data, axis=self.axis), input[0].dtype)]
    return _scan(self, input)


@contextlib.contextmanager
def quick():
    with (
        mock.patch.object(interpreter.ReduceOps, "apply_impl", reduced),
        mock.patch.object(interpreter.ScanOps, "apply_impl", scanned),
    ):
        yield
