"""Reading weight files without running code from them; writing them so that a failure leaves no half file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def read(path: Path, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything (or what is ``wanted``) in a weight file, one after the other, on the CPU.

    ``.safetensors`` files hold nothing but tensors; all others are read by torch with ``weights_only=True``, which
    refuses anything that is no plain data.

    Raises:
        ValueError: no weight file, broken, or with content other than tensors under names.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (a file handle, not a dict)
                    if wanted is None or wanted(name):
                        yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        return
    held = load_plain(path)
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict) or not all(isinstance(k, str) for k in held):
        raise ValueError(f"{path} does not hold tensors under names, but a {type(held).__name__}")
    for name, x in held.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{path} holds {name!r}, which is a {type(x).__name__} and not a tensor")
        if wanted is None or wanted(name):
            yield name, x


def load_plain(path: Path) -> Any:
    """A file of torch.save, refusing everything but plain data and tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"{path} cannot be read as plain data, and this library never runs code from a weight file: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def shards(directory: Path, stem: str) -> list[Path]:
    """The files of one set of weights, ``stem.<suffix>`` or what its index names; safetensors before others."""
    for suffix in (".safetensors", ".bin"):
        index = directory / f"{stem}{suffix}.index.json"
        if index.is_file():
            names = sorted(set(weight_map(index).values()))
            missing = [n for n in names if not (directory / n).is_file()]
            if missing:
                raise ValueError(f"{index} names {missing[0]}, which is not there")
            return [directory / n for n in names]
        single = directory / f"{stem}{suffix}"
        if single.is_file():
            return [single]
    return []


def weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, as an index of shards names it.

    Raises:
        ValueError: it is not such an index.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} is not JSON: {error}") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files")
    return found


def check_adapter(directory: Path, carried: bool) -> None:
    """
    Raises:
        ValueError: the directory holds an adapter, and what will be written there carries none to replace it.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"):
        if not carried and (directory / name).exists():
            raise ValueError(f"{directory} must hold no other adapter, it has {name} and what is saved carries none")


def clear_shards(directory: Path) -> None:
    """Remove the indices of shards that were here before, which would be read instead of whole files."""
    for stem in ("trainable_params", "adapter_model"):
        (directory / f"{stem}.safetensors.index.json").unlink(missing_ok=True)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file; tensors that share memory are written apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    apart, storages = {}, set()
    for name, x in tensors.items():
        own = _own(x)
        at = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if own.numel() and at in storages else own
        storages.add(at)
    _atomically(path, lambda to: save_file(apart, to, {"format": "pt", **(metadata or {})}))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _atomically(path, lambda to: to.write_text(text, encoding="utf-8"))


def _own(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole and x.is_contiguous() else x.contiguous().clone()


def _atomically(path: Path, make: Callable[[Path], Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
