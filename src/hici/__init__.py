"""``import hici`` is ``import hici_kernels``: one module under two names, submodules included."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

import hici_kernels


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Resolves hici.x to the very module object hici_kernels.x, where the import system would load a second copy."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("hici."):
            return None
        real = importlib.import_module(_real_name(name))
        origin = real.__spec__.origin if real.__spec__ is not None else None
        spec = importlib.machinery.ModuleSpec(name, self, origin=origin, is_package=hasattr(real, "__path__"))
        spec.loader_state = real.__spec__
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return importlib.import_module(_real_name(spec.name))

    def exec_module(self, module: ModuleType) -> None:
        # the import system has stamped the alias' spec on the shared module: give it back its own
        module.__spec__ = sys.modules[module.__name__].__spec__ if module.__spec__ is None else module.__spec__
        if module.__spec__ is not None and module.__spec__.loader is self:
            module.__spec__ = module.__spec__.loader_state
        _name_what_is_loaded()  # a package has loaded modules of its own

    # ``python -m hici`` and runpy take the code of a module from its loader and run it once more, as __main__

    def is_package(self, fullname: str) -> bool:
        return self._inspector(fullname).is_package(_real_name(fullname))

    def get_code(self, fullname: str) -> CodeType | None:
        return self._inspector(fullname).get_code(_real_name(fullname))

    def get_source(self, fullname: str) -> str | None:
        return self._inspector(fullname).get_source(_real_name(fullname))

    def get_filename(self, fullname: str) -> str:
        return self._inspector(fullname).get_filename(_real_name(fullname))

    def _inspector(self, fullname: str) -> Any:
        spec = importlib.util.find_spec(_real_name(fullname))
        if spec is None or not hasattr(spec.loader, "get_code"):
            raise ImportError(f"the loader of {_real_name(fullname)} has no code to show", name=fullname)
        return spec.loader


def _real_name(name: str) -> str:
    return "hici_kernels" + name.removeprefix("hici")


def _name_what_is_loaded() -> None:
    """Give every module its alias: an import by it would bind it in its package again, over a function of its name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("hici_kernels."):
            sys.modules.setdefault("hici" + name.removeprefix("hici_kernels"), module)


if not any(type(finder).__name__ == "_Alias" and type(finder).__module__ == "hici" for finder in sys.meta_path):
    sys.meta_path.insert(0, _Alias())
_name_what_is_loaded()
sys.modules[__name__] = hici_kernels
