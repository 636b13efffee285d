"""Ahead-of-time compilation of every configuration of every table, on a machine without a GPU.

    python -m hici_kernels.aot [--report FILE] [--jobs N] [--one-per-kernel]

compiles what the implementations ``ops/<op>/triton.py`` launch (see :mod:`.record`) for every entry of every table,
each for its entry's own architecture, and reports registers, shared memory and spills. It fails (exit code 1) if a
kernel does not compile, needs more shared memory than the chip has, or spills more than ``SPILL_LIMIT`` bytes per
thread and is not listed in ``exceptions.json`` with what that costs.

The report is also the cache: a record whose key (the sources of the kernel and of everything it calls, its signature,
constexprs, options, target and Triton's version) is still true is taken over, not compiled again.

:mod:`.fit` shrinks configurations that nobody has measured until they pass.

Needs triton; importing this package does not import it.
"""

from __future__ import annotations

#: What must be compiled for every table that has kernels; further architectures come from the tables.
REQUIRED = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Bytes of spill stores per thread that are let pass: a few registers around the loop, not inside it.
SPILL_LIMIT = 64
