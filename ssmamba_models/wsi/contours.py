"""Outlines of tissue as polygons in level-0 pixels, and as GeoJSON that QuPath opens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from ssmamba_models.output import whole_file
from ssmamba_models.wsi.tissue import TissueMask

TISSUE_COLOR = (0, 150, 80)


@dataclass(frozen=True)
class Contour:
    """One connected piece of tissue.

    Attributes:
        outer: (n, 2) float64, its outline (x, y), level-0 px; the last point is the first.
        holes: outlines of the holes in it, each as `outer`.
    """

    outer: np.ndarray
    holes: tuple[np.ndarray, ...]

    @property
    def rings(self) -> tuple[np.ndarray, ...]:
        """The outline, then those of the holes."""
        return (self.outer, *self.holes)


def tissue_contours(mask: TissueMask) -> list[Contour]:
    """Trace a mask's outlines (marching squares).

    Args:
        mask: where tissue is.

    Returns:
        A contour for each connected piece, largest first; none for an empty mask.

    Raises:
        ImportError: contourpy (it comes with matplotlib) is missing.
    """
    # A frame of background closes the outlines of tissue that reaches the slide's edge.
    framed = np.pad(mask.mask, 1).astype(np.float32)
    contourpy = _require_contourpy()
    generator = contourpy.contour_generator(z=framed, fill_type=contourpy.FillType.OuterOffset)
    contours = []
    for points, offsets in zip(*generator.filled(0.5, 2.0)):
        outer, *holes = (_ring(points[start:stop], mask) for start, stop in pairwise(offsets))
        contours.append(Contour(outer, tuple(holes)))
    return sorted(contours, key=lambda contour: -abs(ring_area(contour.outer)))


def _require_contourpy() -> ModuleType:
    try:
        import contourpy
    except ImportError as error:
        raise ImportError(f'outlines need matplotlib ({error}): pip install "ssmamba-models[wsi]"') from error
    return contourpy


def _ring(points: np.ndarray, mask: TissueMask) -> np.ndarray:
    # The frame takes one pixel, and a pixel's centre lies half a pixel from its corner.
    level0 = (points[_turns(points)].astype(np.float64) - 0.5) * mask.downsample
    height, width = mask.mask.shape
    return np.clip(level0, 0, (width * mask.downsample, height * mask.downsample))


def _turns(points: np.ndarray) -> np.ndarray:
    """Which points of a closed ring are corners or its ends; those between on a straight line say nothing."""
    steps = np.diff(points, axis=0)
    before, after = steps[:-1], steps[1:]
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return np.concatenate([[True], cross != 0, [True]])


def ring_area(ring: np.ndarray) -> float:
    """Signed area of a closed ring (n, 2), px**2 (the shoelace formula)."""
    x, y = (ring - ring[0]).T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2)


def polygon_feature(
    rings: Iterable[np.ndarray], name: str, color: tuple[int, int, int], measurements: dict[str, float] | None = None
) -> dict[str, Any]:
    """A GeoJSON feature that QuPath shows as an annotation.

    Args:
        rings: an outline (n, 2) in level-0 px as QuPath counts them, then those of its holes; closed.
        name: of its class.
        color: of its class, RGB.
        measurements: numbers that QuPath lists with it.

    Returns:
        The feature (RFC 7946, with QuPath's properties).
    """
    coordinates = [np.round(ring, 2).tolist() for ring in rings]
    properties: dict[str, Any] = {
        "objectType": "annotation",
        "classification": {"name": name, "color": list(color)},
    }
    if measurements:
        properties["measurements"] = measurements
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": coordinates},
        "properties": properties,
    }


def contours_geojson(contours: Iterable[Contour], origin: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Contours as a GeoJSON feature collection, each an annotation of class "Tissue".

    Args:
        contours: in level-0 px.
        origin: (x, y) in level-0 px, the slide's `origin`: QuPath crops a slide that says where its scanned area
            begins, and counts from there, so it is taken off.
    """
    features = [
        polygon_feature([ring - origin for ring in contour.rings], "Tissue", TISSUE_COLOR) for contour in contours
    ]
    return {"type": "FeatureCollection", "features": features}


def write_geojson(path: str | os.PathLike, collection: dict[str, Any], overwrite: bool = False) -> None:
    """Write GeoJSON whole or not at all.

    Args:
        path: the file; its folder must exist.
        collection: what `contours_geojson` gave, or a collection of `polygon_feature`s.
        overwrite: replace an existing file.

    Raises:
        OSError: it cannot be written, or exists.
    """
    with whole_file(path, overwrite) as part:
        part.write_text(json.dumps(collection, allow_nan=False, separators=(",", ":")), encoding="utf-8")
