"""``import hici`` is ``import hici_kernels``: one module under two names, submodules included."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

import hici_kernels


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Resolves hici.x to the very module object hici_kernels.x, where the import system would load a second copy."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("hici."):
            return None
        real = importlib.import_module("hici_kernels" + name[len("hici") :])
        spec = importlib.machinery.ModuleSpec(name, self, is_package=hasattr(real, "__path__"))
        spec.loader_state = real.__spec__
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return importlib.import_module("hici_kernels" + spec.name[len("hici") :])

    def exec_module(self, module: ModuleType) -> None:
        # the import system has stamped the alias' spec on the shared module: give it back its own
        module.__spec__ = sys.modules[module.__name__].__spec__ if module.__spec__ is None else module.__spec__
        if module.__spec__ is not None and module.__spec__.loader is self:
            module.__spec__ = module.__spec__.loader_state


if not any(type(finder).__name__ == "_Alias" and type(finder).__module__ == "hici" for finder in sys.meta_path):
    sys.meta_path.insert(0, _Alias())
sys.modules[__name__] = hici_kernels
