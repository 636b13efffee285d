"""gather_rows: the Triton kernel.

A program copies BLOCK_W words of one row. Words of 4 bytes: an address is a multiple of 16 where ``ALIGNED`` says so,
and four words are then read at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(addresses, out, WORDS: tl.constexpr, BLOCK_W: tl.constexpr, ALIGNED: tl.constexpr):
    """out int32 [n, WORDS]; addresses int64 [n]. Grid: (n, cdiv(WORDS, BLOCK_W))."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(addresses + row)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = word < WORDS
    found = tl.load(source.to(tl.pointer_type(tl.int32)) + word, mask=inside)
    tl.store(out + row * WORDS + word, found, mask=inside)
