"""A kernel's identity: its text and the text of every jitted function it calls, wherever in a file they stand."""

from __future__ import annotations

import ast
import hashlib
import textwrap
import types
from typing import Any


def source_hash(kernel: Any) -> str:
    """Changes when the kernel, a jitted function it reaches, or a global constant they read changes.

    Triton's own key also changes when a function moves to another line.
    """
    parts: dict[str, str] = {}
    _collect(kernel, parts)
    text = "\n".join(f"{name}\n{parts[name]}" for name in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _collect(function: Any, parts: dict[str, str]) -> None:
    python = function.fn
    name = f"{python.__module__}.{python.__qualname__}"
    if name in parts:
        return
    # as it was read when the function was defined: the file may have changed since
    source = textwrap.dedent("".join(function.raw_src))
    parts[name] = source
    for found_name, value in _globals(ast.parse(source), python.__globals__):
        if isinstance(getattr(value, "fn", None), types.FunctionType):
            _collect(value, parts)
        elif isinstance(value, (bool, int, float, str)):
            parts[f"{name}: {found_name}"] = repr(value)
        elif type(value).__name__ == "constexpr":
            parts[f"{name}: {found_name}"] = repr(value.value)


def _globals(tree: ast.AST, scope: dict[str, Any]) -> list[tuple[str, Any]]:
    """Globals of the function's module that are read in it, and attributes of modules of this package."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in scope:
            found.append((node.id, scope[node.id]))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = scope.get(node.value.id)
            if isinstance(owner, types.ModuleType) and owner.__name__.split(".")[0] != "triton":
                found.append((f"{node.value.id}.{node.attr}", getattr(owner, node.attr, None)))
    return found
