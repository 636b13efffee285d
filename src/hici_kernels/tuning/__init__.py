"""Kernel configurations: tables in the tree, no measuring while a program runs.

    configuration(op, arch, *, head_dim, segment_len, dtype) -> dict      constexprs, num_warps, num_stages
    architecture(device) -> "sm_90", "gfx942", ... or "interpret" for a CPU tensor

A table is ``tables/<op>.json``: a list of entries, each with the arch, head_dim, segment_len and dtypes it is for, its
configuration, where and when that was measured (or "not yet measured"), and why it starts there. ``hici tune``
measures on the GPU at hand and rewrites the entries of that GPU's architecture; nobody else writes measurements.
Tables: ``attention``, ``attention_backward`` (dK and dV), ``attention_backward_dq``, ``local_slots``,
``local_slots_backward``, ``global_stats``, ``global_stats_backward``, ``hga_summaries``, ``hga_route``,
``hga_attention``, ``hga_attention_backward`` (dK and dV), ``hga_attention_backward_dq``, ``gather_rows``. ``head_dim``
and ``segment_len`` are what an operation's cost depends on: D and tokens per segment for attention; for ``local_slots``
the hidden size H and tokens per segment; for ``global_stats`` H and the number of segments; for ``hga_summaries`` D and
tokens per chunk; for ``gather_rows`` bytes of a row. An operation without a meaning for one passes 0.

Which entry serves a call (:func:`configuration`):
    1. architecture: the same; else, among the vendor's chips in the table that have no more shared memory than this
       one, the one with most, the newest among equals (but none newer than this one if any older is there); else the
       one with least.
    2. dtype: an entry that lists it; else one of the same width; else the widest.
    3. head_dim: the smallest that is at least the one asked for; else the largest.
    4. segment_len: the nearest ratio; of two equally near ones, the shorter.
So every call finds a configuration, and a new chip starts with one that fits it.

Ahead-of-time compilation (:mod:`hici_kernels.aot`) calls ``forward`` and ``backward`` of ``ops/<op>/triton.py`` on CPU
tensors for every entry of every table, with :func:`~hici_kernels.tuning.architecture` answering the entry's
architecture and the launch of kernels taken out, and compiles what would have been launched. For that an
implementation only has to prepare its launches on whatever device its tensors are on, and to look configurations up
with ``architecture(tensor.device)``. One whose launches cannot be recorded defines ``aot_signatures(entry) ->
list[AotSignature]`` instead.
"""

from __future__ import annotations

from .chips import architecture, multiprocessors, shared_memory
from .lookup import configuration
from .table import TRITON_TYPES, AotSignature, Entry, read, tables, write

__all__ = [
    "TRITON_TYPES",
    "AotSignature",
    "Entry",
    "architecture",
    "configuration",
    "multiprocessors",
    "read",
    "shared_memory",
    "tables",
    "write",
]
