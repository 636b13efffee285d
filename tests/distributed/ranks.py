"""Runs a function on several gloo ranks, one process each, and brings back what each returned."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``work(*arguments)`` on every rank of a new process group; a failure on any rank is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (ranks, folder, work, arguments), nprocs=ranks)
        return [pickle.loads((Path(folder) / f"{rank}").read_bytes()) for rank in range(ranks)]


def _enter(rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    try:
        found = work(*arguments)
        (Path(folder) / f"{rank}").write_bytes(pickle.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()
