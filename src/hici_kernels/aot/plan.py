"""What there is to compile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import ops, tuning
from ..tuning import AotSignature, Entry
from ..tuning.chips import INTERPRET
from .compile import check, name_of
from .record import launches, op_of


class Task(NamedTuple):
    """One compilation, named so that another process finds it again."""

    module: str
    entry: Entry
    position: int


def modules() -> list[str]:
    """The Triton implementations."""
    root = Path(ops.__file__).parent
    return [f"{ops.__name__}.{p.parent.name}.{p.stem}" for p in sorted(root.glob("*/triton.py"))]


def declared(module: str, entry: Entry) -> list[AotSignature]:
    """What an implementation compiles for an entry, each checked against its kernel's parameters.

    Taken from its own ``aot_signatures(entry)`` where it has one, else recorded from its launches.
    """
    own = getattr(importlib.import_module(module), "aot_signatures", None)
    op = module.split(".")[-2] if "." in module else ""
    found = own(entry) if own is not None else launches(op, entry) if op_of(entry.op) == op else []
    signatures = list(found)
    for signature in signatures:
        check(signature)
    return signatures


def signature_of(task: Task) -> AotSignature:
    return declared(task.module, task.entry)[task.position]


def with_signatures(plan: list[Task]) -> Iterator[tuple[Task, AotSignature]]:
    """Every task with its signature; those of one entry are found in one go."""
    last: tuple[str, Entry] | None = None
    signatures: list[AotSignature] = []
    for task in plan:
        if last is None or last[0] != task.module or last[1] is not task.entry:
            last, signatures = (task.module, task.entry), declared(task.module, task.entry)
        yield task, signatures[task.position]


def tasks(one_per_kernel: bool = False) -> Iterator[Task]:
    """All compilations; ``one_per_kernel``: of every kernel and architecture the first at head_dim 128 or nearest."""
    seen: set[tuple[str, str]] = set()
    for module in modules():
        for op in tuning.tables():
            entries = [e for e in tuning.read(op) if e.arch != INTERPRET]
            if one_per_kernel:
                entries.sort(key=lambda e: abs(e.head_dim - 128))
            for entry in entries:
                for position, signature in enumerate(declared(module, entry)):
                    kernel = (name_of(signature), entry.arch)
                    if one_per_kernel and kernel in seen:
                        continue
                    seen.add(kernel)
                    yield Task(module, entry, position)
