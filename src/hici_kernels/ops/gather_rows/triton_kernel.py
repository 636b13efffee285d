"""gather_rows: the Triton kernel.

A program copies BLOCK_W words of one row. Words of 4 bytes: an address is a multiple of 16 where ``ALIGNED`` says so,
and four words are then read at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(addresses, places, out, WORDS: tl.constexpr, BLOCK_W: tl.constexpr, ALIGNED: tl.constexpr):
    """out int32 [m, WORDS]; addresses int64 [n], 0 = none; places int64 [n] or None. Grid: (n, cdiv(WORDS, BLOCK_W)).

    Without places row i is out[i], zeros where there is no address; with them it is out[places[i]], and a row without
    an address leaves out as it is.
    """
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(addresses + row)
    words = tl.where(source == 0, 0, WORDS)
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    found = tl.load(source.to(tl.pointer_type(tl.int32)) + word, mask=word < words, other=0)
    if places is not None:
        row = tl.load(places + row)
    else:
        words = WORDS
    tl.store(out + row * WORDS + word, found, mask=word < words)
