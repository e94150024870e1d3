"""How setuptools builds the C kernels (optional by default, required when SSMAMBA_REQUIRE_EXT=1) and the sdist.

Named in setup.cfg (cmdclass). Loaded by setuptools on its own, before the package can be imported, so it imports
nothing but setuptools.
"""

from __future__ import annotations

import os
import sysconfig
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

_FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


class BuildExt(build_ext):
    """Builds the kernels; without a working compiler the install goes on, and the package runs on plain torch."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if _FREE_THREADED:
            # Its importers do not look for .abi3.so.
            for extension in self.extensions:
                extension.py_limited_api = False
        if os.environ.get("SSMAMBA_REQUIRE_EXT", "0") not in ("", "0"):
            for extension in self.extensions:
                extension.optional = False

    def get_export_symbols(self, ext: Any) -> list[str]:
        # The library is opened with ctypes, never imported, so there is no PyInit function to export.
        return ext.export_symbols


class BdistWheel(bdist_wheel):
    """One wheel for all versions of Python: the library is opened with ctypes. Free-threaded ones refuse such a tag."""

    def initialize_options(self) -> None:
        super().initialize_options()
        if not _FREE_THREADED:
            self.py_limited_api = "cp310"


class Sdist(sdist):
    """The sources, the changelog with them, and none of the tests: setuptools takes those at their top level alone."""

    def make_distribution(self) -> None:
        self.filelist.exclude_pattern(r"^tests/", is_regex=True)
        self.filelist.append("CHANGELOG.md")
        super().make_distribution()
