"""CLAM's feature files: `h5_files/<slide>.h5` (features (N, D) float32, coords (N, 2) int32) and `pt_files/<slide>.pt`
(the features alone, a torch tensor).

CLAM's feature files as such say nothing of the geometry: it stands on the `coords` of its coordinate files
(`patches/<slide>.h5`) as patch_size and patch_level, downsample (x, y) and level_dim (width, height) of that level.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmamba_models.data.feature_source import FeatureSource
from ssmamba_models.data.foreign import Layout, read_coords, source_of_foreign, write_foreign
from ssmamba_models.data.hdf5 import open_hdf5, plain_attributes, require_h5py, row_blocks
from ssmamba_models.data.tile_geometry import clean
from ssmamba_models.notice import first_line
from ssmamba_models.output import whole_file

CLAM = Layout("clam", features_dtype="float32", coords_dtype="int32")
H5_FOLDER, PT_FOLDER = "h5_files", "pt_files"
# Pixels of a level are not quite square where its sides were rounded; more than this is an error.
_SQUARE = 0.01


def tensor_file(path: Path) -> Path:
    """The `.pt` file that belongs to an `.h5` file: beside it, or in the folder `pt_files` beside `h5_files`."""
    folder = path.parent.with_name(PT_FOLDER) if path.parent.name == H5_FOLDER else path.parent
    return folder / f"{path.stem}.pt"


@contextlib.contextmanager
def read_clam(path: Path, given: Mapping[str, Any], coords: Path | None = None) -> Iterator[FeatureSource]:
    """Open a feature file of CLAM; its `.pt` file, if there is one, must hold the same features.

    Args:
        path: the `.h5` file.
        given: what the user says of the slide: any of `GEOMETRY`, and "model".
        coords: CLAM's folder of coordinate files (`patches`), or one such file.

    Raises:
        ValueError: it is no such file, does not say what ours needs (see `source_of_foreign`), or its `.pt` file is not
            safe or differs.
        OSError: it cannot be read.
    """
    where = str(path)
    with open_hdf5(path, "CLAM", "copy it again") as file:
        stated = plain_attributes(file["coords"]) if "coords" in file else {}
        if coords is not None:
            stated = {**_coordinate_file(file, path, coords), **stated}
        source = source_of_foreign(file, CLAM, where, {"name": path.stem, **_geometry(stated, where)}, given, None)
        if tensor_file(path).is_file():
            _check_same(source, read_tensor(tensor_file(path)), tensor_file(path))
        yield source


def _coordinate_file(file: Any, path: Path, coords: Path) -> dict[str, Any]:
    place = coords / path.name if coords.is_dir() else coords
    with open_hdf5(place, "CLAM's create_patches_fp", "copy it again") as other:
        if not np.array_equal(read_coords(other, str(place)), read_coords(file, str(path))):
            raise ValueError(f"the coordinates in {str(place)!r} are not those of {str(path)!r}")
        return plain_attributes(other["coords"])


def _geometry(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    geometry = {name: stated[name] for name in ("name", "overlap") if name in stated}
    if "patch_size" not in stated:
        return geometry
    # Some forks read larger patches and shrink them by this.
    shrink = clean("patch_size", stated.get("custom_downsample", 1), where)
    on_level = clean("patch_size", stated["patch_size"], where)
    geometry["patch_size"] = on_level // shrink
    downsample = _downsample(stated, where)
    if downsample is None:
        return geometry
    geometry["patch_size_level0"] = on_level * float(np.mean(downsample))
    if "level_dim" in stated:
        sides = np.asarray(stated["level_dim"], dtype=float) * downsample
        geometry["level0_width"], geometry["level0_height"] = (round(side) for side in sides.tolist())
    return geometry


def _downsample(stated: Mapping[str, Any], where: str) -> np.ndarray | None:
    if "downsample" not in stated:
        return np.ones(2) if stated.get("patch_level") == 0 else None
    downsample = np.broadcast_to(np.asarray(stated["downsample"], dtype=float), 2)
    if not np.all(downsample > 0) or np.ptp(downsample) > _SQUARE * downsample.mean():
        raise ValueError(f"{where}: the downsample {downsample.tolist()} is not that of square pixels")
    return downsample


def read_tensor(path: Path) -> torch.Tensor:
    """Read a `.pt` file of features, running nothing that it contains.

    Returns:
        (N, D), on the CPU, mapped into memory where the file allows it.

    Raises:
        ValueError: it is not a plain tensor of two axes.
        OSError: it cannot be read.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # Broken files make torch raise what its parts raise: KeyError, IndexError, OSError, BadZipFile and others.
    except Exception as error:
        if getattr(error, "filename", None) is not None:
            raise
        reason = first_line(error)
        raise ValueError(f"{str(path)!r} is not a plain tensor, and nothing else is read from it ({reason})") from error
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__}, expected a tensor (N, D)")
    if found.ndim != 2 or found.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"{str(path)!r} holds {found.dtype} of shape {tuple(found.shape)}, expected float32 (N, D)")
    return found


def _check_same(source: FeatureSource, tensor: torch.Tensor, path: Path) -> None:
    rows, width = len(source.coords), source.embed_dim
    if tuple(tensor.shape) != (rows, width):
        raise ValueError(f"{str(path)!r} holds {tuple(tensor.shape)} features, {source.where!r} ({rows}, {width})")
    for block in row_blocks(rows, 4 * width):
        # NaN equals NaN here: what is the same in both files is no loss.
        if not np.array_equal(source.features[block], tensor[block].numpy(), equal_nan=True):
            raise ValueError(f"{str(path)!r} does not hold the features of {source.where!r}; delete the wrong one")


def write_clam(source: FeatureSource, out: Path, overwrite: bool) -> None:
    """Write a source as CLAM's pair of files, both whole or neither.

    CLAM knows only pyramid levels, so the tiles are described on level 0: patch_level 0, patch_size our
    patch_size_level0, rounded; the exact numbers stand beside them as `ssmamba.patch_size_level0` and so on. float16
    features are stored as float32, which is exact. The features must fit into memory once, for the `.pt` file.

    Args:
        source: what to write.
        out: the `.h5` file; the `.pt` file goes where `tensor_file` says.
        overwrite: whether existing files may be replaced.

    Raises:
        OSError: a file cannot be written.
        ValueError: a coordinate does not fit int32.
    """
    geometry = source.coords_attributes
    sides = np.array([geometry["level0_width"], geometry["level0_height"]])
    native = {
        "patch_size": round(geometry["patch_size_level0"]),
        "patch_level": 0,
        "downsample": np.ones(2),
        "level_dim": sides,
        "downsampled_level_dim": sides,
        "name": geometry["name"],
    }
    tensors = tensor_file(out)
    with whole_file(out, overwrite) as part, whole_file(tensors, overwrite) as tensor_part:
        write_foreign(source, part, CLAM, native, {})
        with require_h5py().File(part, "r") as file:
            features = file["features"][...].reshape(len(source.coords), source.embed_dim)
        with open(tensor_part, "wb") as file:  # given a name, torch would write the temporary one into the file
            torch.save(torch.from_numpy(features), file)
