"""Importing a module of ours as soon as another package is imported.

timm and torch know of our models and operators once the modules that define them are imported, and these modules import
torch and timm, which takes seconds. So they wait for the first who needs torch or timm anyway.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def import_after(package: str, module: str) -> None:
    """Import `module` right after `package`: now, where that is imported already, or when somebody imports it.

    Whoever imports the package must not fail for what is wrong with our module: it then stays out, and says why when it
    is asked for.
    """
    if package in sys.modules:
        _import(module)
    elif not any(isinstance(hook, _Hook) and hook.is_for(package, module) for hook in sys.meta_path):
        sys.meta_path.insert(0, _Hook(package, module))


def _import(module: str) -> None:
    # What torch, torchvision and timm raise where their builds do not fit each other.
    with contextlib.suppress(ImportError, OSError, RuntimeError, AttributeError):
        importlib.import_module(module)


class _Hook(MetaPathFinder):
    """Finds the package as others do, and has its loader import our module when the package is complete.

    It stays until that has happened: others may only ask where the package is, and a failed import may be tried again.
    """

    def __init__(self, package: str, module: str):
        self._package, self._module = package, module
        self._is_searching = False

    def is_for(self, package: str, module: str) -> bool:
        """Whether another hook would do the same."""
        return (package, module) == (self._package, self._module)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._package or self._is_searching or self not in sys.meta_path:
            return None
        self._is_searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_searching = False
        if spec is None or spec.loader is None:
            return spec  # it may yet be installed
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            vars(spec.loader).pop("exec_module", None)  # ours; the class has its own
            _import(self._module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
