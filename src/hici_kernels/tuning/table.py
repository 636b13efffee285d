"""Tables as files, and one of their entries."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "tables"
NOT_MEASURED = "not yet measured"

#: torch dtype name -> Triton's element type
TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

# what Triton takes beside a kernel's own arguments
OPTIONS = ("num_warps", "num_stages", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim", "maxnreg")


@dataclass(frozen=True)
class Entry:
    """One configuration and what it is for.

    Args:
        op: name of the table.
        arch: "sm_90", "gfx942", ..., or "interpret".
        head_dim, segment_len: see the package's docstring; 0 = any.
        dtypes: torch dtype names.
        configuration: kernel constexprs, num_warps, num_stages.
        measured: where, when and how fast, or the text "not yet measured".
        why: where the values come from.
    """

    op: str
    arch: str
    head_dim: int
    segment_len: int
    dtypes: tuple[str, ...]
    configuration: dict[str, int]
    measured: dict[str, Any] | str = NOT_MEASURED
    why: str = ""

    @property
    def dtype(self) -> str:
        """The first dtype: all of an entry's dtypes compile to the same shape of code."""
        return self.dtypes[0]

    @property
    def constexprs(self) -> dict[str, int]:
        """The configuration without what goes to Triton as an option."""
        return {k: v for k, v in self.configuration.items() if k not in OPTIONS}

    @property
    def options(self) -> dict[str, int]:
        """num_warps, num_stages and whatever else of the configuration Triton takes as an option."""
        return {k: v for k, v in self.configuration.items() if k in OPTIONS}

    def with_configuration(self, configuration: dict[str, int], measured: dict[str, Any] | str, why: str) -> Entry:
        """The entry with other values."""
        return replace(self, configuration=configuration, measured=measured, why=why)


@dataclass(frozen=True)
class AotSignature:
    """One kernel to compile for one entry of a table.

    Args:
        kernel: the ``@triton.jit`` function.
        variant: what tells this compilation from the kernel's others, for a reader.
        arguments: argument name -> Triton type ("*bf16", "i32", "i64", "fp32", "*i1"), all but constexprs.
        constexprs: argument name -> value.
        divisible: arguments that are multiples of 16 at every real launch (pointers, strides); without this loads are
            scalar and nothing is pipelined.
        options: further Triton options of this kernel, over those of the entry.
    """

    kernel: Any
    variant: str
    arguments: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...] = ()
    options: dict[str, Any] | None = None


def tables() -> list[str]:
    """Names of all tables."""
    return sorted(p.stem for p in FOLDER.glob("*.json"))


@functools.cache
def read(op: str) -> tuple[Entry, ...]:
    """All entries of a table, in the file's order.

    Raises:
        ValueError: there is no such table; names those there are.
    """
    path = FOLDER / f"{op}.json"
    if op not in tables():
        raise ValueError(f"op must be one of {', '.join(tables())}, got {op!r}")
    return tuple(parse(op, row) for row in json.loads(path.read_text(encoding="utf-8"))["entries"])


def parse(op: str, row: dict[str, Any]) -> Entry:
    """One row of the file."""
    return Entry(
        op=op,
        arch=row["arch"],
        head_dim=row["head_dim"],
        segment_len=row["segment_len"],
        dtypes=tuple(row["dtypes"]),
        configuration=dict(row["configuration"]),
        measured=row["measured"],
        why=row["why"],
    )


def write(op: str, entries: list[Entry], folder: Path = FOLDER) -> Path:
    """Write a table whole or not at all; one line per entry, so that a change of one is a change of one line."""
    rows = [
        json.dumps(
            {
                "arch": e.arch,
                "head_dim": e.head_dim,
                "segment_len": e.segment_len,
                "dtypes": list(e.dtypes),
                "configuration": e.configuration,
                "measured": e.measured,
                "why": e.why,
            }
        )
        for e in entries
    ]
    text = '{\n  "op": ' + json.dumps(op) + ',\n  "entries": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
    path = folder / f"{op}.json"
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as f:
        f.write(text)
    os.chmod(temporary, 0o644)  # mkstemp makes it private; the table is part of the package
    os.replace(temporary, path)
    read.cache_clear()
    return path
