"""Text the demo model has not seen: packages held out of its training, or a file of the user's."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Stream", "Window", "file_stream", "held_out_streams", "windows"]


@dataclass(frozen=True)
class Stream:
    """One text.

    Attributes:
        name: package or file name.
        data: the bytes.
        files: what they were read from, in order.
    """

    name: str
    data: bytes
    files: tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """``length`` bytes of a stream: ``ids [1, length]`` int64, starting at byte ``start`` of ``source``."""

    source: str
    start: int
    ids: Tensor


def held_out_streams(packages: Sequence[str], root: Path | None = None) -> list[Stream]:
    """The source of the named standard-library packages, one stream each, largest first.

    Every file stands under the header line the model met in training. Tests are left out: many installations have
    none.

    Args:
        packages: top-level names, as ``byte_lm.json`` lists them.
        root: the standard library; None means that of the running interpreter.

    Raises:
        ValueError: if none of the packages has source files there.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = []
    for package in packages:
        folder, module = root / package, root / f"{package}.py"
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [module] if module.is_file() else []
        parts = []
        for file in files:
            header = f"# file: {file.relative_to(root).as_posix()}\n".encode()
            parts.append(header + file.read_bytes().replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n\n")
        if parts:
            found.append(Stream(package, b"".join(parts), tuple(f.relative_to(root).as_posix() for f in files)))
    if not found:
        raise ValueError(f"root={str(root)!r} holds no source of {', '.join(packages)}: name a text with --text FILE")
    return sorted(found, key=lambda s: (-len(s.data), s.name))


def file_stream(path: Path) -> Stream:
    """The bytes of one file.

    Raises:
        ValueError: naming ``text`` if the file is missing, no regular file, or not readable.
    """
    if not path.exists():
        raise ValueError(f"text must be an existing file, got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"text must be a file, got {str(path)!r}, which is a directory or a device")
    try:
        return Stream(path.name, path.read_bytes(), (str(path),))
    except OSError as error:
        raise ValueError(f"text must be a readable file, got {str(path)!r}: {error.strerror}") from error


def _fractions() -> Iterator[float]:
    """1/2, 1/4, 3/4, 1/8, 5/8, ...: every prefix covers [0, 1] evenly, so the number of windows moves none of them."""
    denominator = 2
    while True:
        low = list(range(1, denominator, 2))
        yield from (k / denominator for k in sorted(low, key=lambda k: (k % 4 != 1, k)))
        denominator *= 2


def windows(streams: Sequence[Stream], length: int, count: int) -> list[Window]:
    """At most ``count`` windows of ``length`` bytes that do not start at the same place.

    The rule is fixed, so that no window is there because its numbers are pleasant: the middle of every stream in
    turn, then the quarters, and so on.

    Raises:
        ValueError: if no stream holds ``length`` bytes.
    """
    long_enough = [s for s in streams if len(s.data) >= length]
    if not long_enough:
        best = max(streams, key=lambda s: len(s.data))
        raise ValueError(f"text must hold at least {length:,} bytes, got {len(best.data):,} in {best.name!r}")
    found: list[Window] = []
    taken = set()
    for fraction in _fractions():
        fresh = False
        for stream in long_enough:
            start = int(fraction * (len(stream.data) - length))
            if (stream.name, start) in taken:
                continue
            fresh = True
            taken.add((stream.name, start))
            body = bytearray(stream.data[start : start + length])
            found.append(Window(stream.name, start, torch.frombuffer(body, dtype=torch.uint8).long()[None]))
            if len(found) == count:
                return found
        if not fresh:
            return found
    raise AssertionError("the fractions never end")
