"""Whole weights out of a sharded torch.distributed checkpoint (FSDP), without running code from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_ALLOWED: dict[str, set[str] | None] = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device", "layout", "dtype", "memory_format"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _Unpickler(pickle.Unpickler):
    """Only what a checkpoint's table of contents is made of."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get(module, set())
        plain = "." not in name
        if plain and (allowed is None or name in allowed or (module == "torch" and _is_dtype(name))):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's table of contents")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def find(run: Path) -> Path | None:
    """The directory with a ``.metadata`` file: ``run`` or one directly below."""
    found = [p.parent for p in [run / ".metadata", *sorted(run.glob("*/.metadata"))] if p.is_file()]
    weights_first = sorted(found, key=lambda p: "optim" in p.name)
    return weights_first[0] if weights_first else None


def weights(directory: Path) -> dict[str, Tensor]:
    """All tensors by name, in their stored dtype.

    Raises:
        ValueError: the table of contents or a shard cannot be read.
    """
    reader = _Reader(directory)
    try:
        metadata = reader.read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise ValueError(f"{directory / '.metadata'} cannot be read: {error}") from error
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(("optimizer.", "optim."))
    }
    try:
        load(wanted, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # of the shards; no Exception to Python
        reason = next((str(cause[0]) for cause in error.failures.values()), str(error)).splitlines()
        raise ValueError(f"{directory} cannot be read: {reason[-1] if reason else 'a shard is damaged'}") from error
    # trainers put the whole state dict of the model under one more name
    for head in ("app.model.", "model.", "module."):
        below = (f"{head}model.", f"{head}base_model.")
        if wanted and all(n.startswith(head) for n in wanted) and any(n.startswith(below) for n in wanted):
            return {name.removeprefix(head): x for name, x in wanted.items()}
    return wanted
