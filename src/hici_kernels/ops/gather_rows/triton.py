"""gather_rows in Triton: the processors of the GPU read pinned host memory themselves, all rows in one launch.

Copy engines move a row at a time, and rows of a few KiB take them longer to begin than to move. Here rows of any size
are in flight together, as many as the link holds. Nothing is read back from the device and nothing waited for: memory
at the addresses must stay as it is until the launch has run. Rows of a multiple of 4 bytes at multiples of 4. An
address of 0 names no row: which rows there are may be known to the device alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import tuning
from ..._triton import interpreted, too_old

WORD = 4


def rejects(addresses: Tensor, row_bytes: int, device: torch.device, *rest: object) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it serves GPUs (the CPU in Triton's interpreter, TRITON_INTERPRET=1), device is {device}"
    if row_bytes % WORD:
        return f"it serves rows of a multiple of {WORD} bytes, row_bytes is {row_bytes}"
    return too_old(device)


def forward(
    addresses: Tensor,
    row_bytes: int,
    device: torch.device,
    aligned: bool | None = None,
    memory: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """uint8 [n, row_bytes] on ``device`` from addresses int64 [n] (any device) of memory that the GPU can read; zeros
    where an address is 0.

    aligned: whether all addresses are multiples of 16; None = look, which the host does only for those it knows.
    memory, places: uint8 [m, row_bytes], contiguous, and int64 [n] there: row i becomes memory[places[i]] instead, and
    one without an address changes nothing. Places of rows with one are distinct.
    """
    from .triton_kernel import gather

    out = torch.empty(len(addresses), row_bytes, dtype=torch.uint8, device=device) if memory is None else memory
    n, words = len(addresses), row_bytes // WORD
    if n == 0 or words == 0:
        return out
    if aligned is None:
        aligned = addresses.is_cpu and not bool((addresses % 16).any())
    config = tuning.configuration(
        "gather_rows", tuning.architecture(device), head_dim=row_bytes, segment_len=0, dtype=torch.float32
    )
    block = min(config["BLOCK_W"], 1 << (words - 1).bit_length())
    with torch.cuda.device_of(out):
        gather[(n, -(-words // block))](
            addresses.to(device, non_blocking=True),
            places,
            out.view(torch.int32),
            WORDS=words,
            BLOCK_W=block,
            ALIGNED=aligned and row_bytes % 16 == 0,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
    return out
