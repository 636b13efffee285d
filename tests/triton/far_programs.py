"""Launches of which only the first and last programs run: results at the far end of arrays that are never filled.

Such arrays hold more than 2^31 elements, so that every offset near their end needs 64 bits; the system gives memory
only to the pages that are touched.
"""

import builtins
import contextlib
from unittest import mock

from triton.runtime import interpreter

MANY, ENDS = 1 << 16, 8


def ends(*arguments):
    """``range`` for the interpreter's loops over a grid: of many programs the first and last few."""
    if len(arguments) > 1 or arguments[0] < MANY:
        return builtins.range(*arguments)
    return (*builtins.range(ENDS), *builtins.range(arguments[0] - ENDS, arguments[0]))


@contextlib.contextmanager
def only_ends():
    with mock.patch.object(interpreter, "range", ends, create=True):
        yield
