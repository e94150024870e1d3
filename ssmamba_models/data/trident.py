"""TRIDENT's feature files: `features_<encoder>/<slide>.h5` with features (N, D) or (1, N, D) and coords (N, 2).

On `coords` stand patch_size, patch_size_level0, level0_magnification, target_magnification, overlap, level0_width,
level0_height, name and savetodir, numbers often as floats; on `features` name, savetodir and encoder. Magnifications do
not tell the mpp (scanners differ by several percent), so the user must.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssmamba_models.data.feature_source import FeatureSource
from ssmamba_models.data.foreign import Layout, source_of_foreign, write_foreign
from ssmamba_models.data.hdf5 import open_hdf5, plain_attributes
from ssmamba_models.output import whole_file

TRIDENT = Layout("trident", features_dtype=None, coords_dtype="int64")
FOLDER = "features_"
_STATED = ("patch_size", "patch_size_level0", "overlap", "level0_width", "level0_height", "name")


@contextlib.contextmanager
def read_trident(path: Path, given: Mapping[str, Any]) -> Iterator[FeatureSource]:
    """Open a feature file of TRIDENT.

    Args:
        path: the file.
        given: what the user says of the slide: any of `GEOMETRY`, and "model".

    Raises:
        ValueError: it is no such file, or does not say what ours needs; see `source_of_foreign`.
        OSError: it cannot be read.
    """
    where = str(path)
    with open_hdf5(path, "TRIDENT", "copy it again") as file:
        stated = plain_attributes(file["coords"]) if "coords" in file else {}
        geometry = {name: stated[name] for name in _STATED if _says(stated, name)}
        yield source_of_foreign(file, TRIDENT, where, {"name": path.stem, **geometry}, given, _encoder(file, path))


def _says(attributes: Mapping[str, Any], name: str) -> bool:
    # TRIDENT writes None as the text "None".
    return attributes.get(name) not in (None, "None")


def _encoder(file: Any, path: Path) -> str | None:
    stated = plain_attributes(file["features"]) if "features" in file else {}
    if _says(stated, "encoder"):
        return str(stated["encoder"])
    folder = path.parent.name
    return folder.removeprefix(FOLDER) if folder.startswith(FOLDER) and folder != FOLDER else None


def write_trident(source: FeatureSource, out: Path, overwrite: bool) -> None:
    """Write a source as a feature file of TRIDENT.

    The magnifications are 10 / mpp, rounded as TRIDENT's are; the exact mpp stand beside them as `ssmamba.level0_mpp`
    and `ssmamba.target_mpp`.

    Raises:
        OSError: the file cannot be written.
    """
    geometry = source.coords_attributes
    native = {
        "patch_size": geometry["patch_size"],
        "patch_size_level0": round(geometry["patch_size_level0"]),
        "level0_magnification": _magnification(geometry["level0_mpp"]),
        "target_magnification": _magnification(geometry["target_mpp"]),
        **{name: geometry[name] for name in ("overlap", "level0_width", "level0_height", "name")},
    }
    on_features = {"name": geometry["name"], **({"encoder": source.model} if source.model else {})}
    with whole_file(out, overwrite) as part:
        write_foreign(source, part, TRIDENT, native, on_features)


def _magnification(mpp: float) -> int | float:
    return round(10 / mpp) or 10 / mpp
