"""From .bin files to .safetensors, without running code from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from . import files


def convert(path: str | Path, *, remove: bool = False, progress: Callable[[str], None] | None = None) -> list[Path]:
    """Write every .bin weight file (one file, or all of a directory) as .safetensors beside it.

    Files are read with weights_only=True. Every written file is read back and compared bit for bit before anything is
    removed. ``pytorch_model*`` becomes ``model*``, the name transformers looks for, and a shard index follows.

    Args:
        path: a file or a directory.
        remove: delete each .bin file once its copy has been checked.
        progress: called with a line for every file.

    Returns:
        The files written.

    Raises:
        ValueError: nothing to convert, a file that holds more than tensors, a target that exists; what has been
            written before stays. OSError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    sources = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    sources = [p for p in sources if p.name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")]
    if not sources:
        raise ValueError(f"{path} holds no .bin file to convert")
    if path.is_file() and path.suffix == ".safetensors":
        raise ValueError(f"{path} is a safetensors file already")
    indices = sorted(path.glob("*.bin.index.json")) if path.is_dir() else []
    targets = {p: p.with_name(_renamed(p.name)) for p in [*sources, *indices]}
    for target in targets.values():
        if target.exists():
            raise ValueError(f"{target} exists already; remove it to convert again")
    if len(set(targets.values())) < len(targets):
        twice = sorted(str(t) for t in targets.values() if list(targets.values()).count(t) > 1)[0]
        raise ValueError(f"{path} holds two files that would both become {twice}")
    contents = {}
    for index in indices:
        named = {name: _renamed(file) for name, file in files.weight_map(index).items()}
        contents[index] = {**json.loads(index.read_text(encoding="utf-8")), "weight_map": named}
    written = []
    for source in sources:
        tensors = _tensors(source)
        files.write(targets[source], tensors)
        _compare(tensors, targets[source])
        written.append(targets[source])
        if progress is not None:
            progress(f"{source.name} -> {targets[source].name} ({len(tensors)} tensors)")
    for index, content in contents.items():
        files.write_text(targets[index], json.dumps(content, indent=2, sort_keys=True) + "\n")
        written.append(targets[index])
    if remove:
        for source in [*sources, *indices]:
            source.unlink()
    return written


def _tensors(source: Path) -> dict[str, Tensor]:
    held = files.load_plain(source)
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict) and len(held) > 1:
        beside = sorted(str(key) for key in held if key != "state_dict")[0]
        raise ValueError(f"{source} holds {beside!r} beside its tensors, which a .safetensors file would lose")
    del held
    tensors = dict(files.read(source))
    for name, x in tensors.items():
        if x.layout != torch.strided or x.is_quantized:
            kind = "quantised" if x.is_quantized else str(x.layout).removeprefix("torch.")
            raise ValueError(f"{source} holds {name!r}, which is {kind}: .safetensors files hold plain tensors")
        if name == "__metadata__":
            raise ValueError(f"{source} holds a tensor named {name!r}, which .safetensors files use for themselves")
    return tensors


def _renamed(name: str) -> str:
    if name.startswith("pytorch_model"):
        name = name.removeprefix("pytorch_")
    index = ".index.json" if name.endswith(".index.json") else ""
    return f"{Path(name.removesuffix(index)).stem}.safetensors{index}"


def _compare(tensors: dict[str, Tensor], path: Path) -> None:
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for name, x in tensors.items():
            back = file.get_tensor(name) if name in names else None
            same = back is not None and back.dtype == x.dtype and back.shape == x.shape
            if back is None or not same or not _bits_equal(back, x):
                path.unlink(missing_ok=True)
                raise ValueError(f"{path} does not read back {name} as it was written")
        if len(names) != len(tensors):
            raise ValueError(f"{path} holds other tensors than were written")


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    """Equality that takes NaN for itself."""
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if wide is None or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.contiguous().view(-1).view(wide), b.contiguous().view(-1).view(wide))
