"""Synthetic H&E: images that look like stained tissue at 20x (0.5 um per px), for demos, examples and tests.

Light is absorbed, so stains add up in optical density, not in RGB: each image is drawn as two maps, the
concentrations of haematoxylin and eosin, and turned into light at the end (Beer-Lambert; Ruifrok and
Johnston, 2001). Nothing here imitates a disease; it has the colours, sizes and textures, and no diagnosis.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

# Optical density per unit of concentration in R, G, B.
_HAEMATOXYLIN = np.array([0.63, 0.72, 0.36], dtype=np.float32)
_EOSIN = np.array([0.17, 0.83, 0.47], dtype=np.float32)


def synthetic_he(size: int | tuple[int, int] = 512, seed: int = 0, kind: str = "glands") -> Image.Image:
    """Draw one H&E-like image.

    Args:
        size: side in pixels, or (width, height); at least 16.
        seed: the same seed draws the same image.
        kind: "glands" (glands with lumen in stroma, and some glass), "stroma" (fibres and spindle nuclei) or
            "solid" (sheets of large irregular nuclei).

    Returns:
        A PIL image of mode RGB.

    Raises:
        ValueError: the size is too small, or the kind is unknown.
    """
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 16:
        raise ValueError(f"a synthetic image of {width} x {height} px is too small; use 16 px or more")
    if kind not in TISSUE_KINDS:
        raise ValueError(f"unknown kind of tissue {kind!r}; choose from {', '.join(TISSUE_KINDS)}")
    section = _Section(width, height, np.random.default_rng([seed, width, height]))
    TISSUE_KINDS[kind](section)
    return section.render()


def write_synthetic_tiles(
    folder: str | os.PathLike, tiles_per_kind: int = 8, size: int = 224, seed: int = 0
) -> Path:
    """Write a small labelled folder of tiles, one class folder per kind of tissue.

    Args:
        folder: made if missing; holds `<kind>/<kind>_000.png` and so on.
        tiles_per_kind: number of tiles of each kind.
        size: side of a tile in pixels.
        seed: the same seed writes the same tiles.

    Returns:
        The folder.
    """
    root = Path(folder)
    for kind in TISSUE_KINDS:
        (root / kind).mkdir(parents=True, exist_ok=True)
        for index in range(tiles_per_kind):
            tile = synthetic_he(size, seed=seed * 100_003 + index, kind=kind)
            tile.save(root / kind / f"{kind}_{index:03d}.png")
    return root


class _Section:
    """A piece of tissue being drawn: two concentration maps (H, W) and the noise that textures them."""

    def __init__(self, width: int, height: int, rng: np.random.Generator):
        self.width, self.height, self.rng = width, height, rng
        self.haematoxylin = np.zeros((height, width), np.float32)
        self.eosin = np.zeros((height, width), np.float32)
        self.y, self.x = np.mgrid[0:height, 0:width].astype(np.float32)
        # One patch of chromatin, cut at random places, textures all nuclei.
        self.chromatin = _noise(rng, 192, 192, 3.0)

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """The rows and columns within `reach` px of a point; empty where that lies outside the section."""
        top, left = max(int(y - reach), 0), max(int(x - reach), 0)
        return slice(top, max(int(y + reach) + 1, top)), slice(left, max(int(x + reach) + 1, left))

    def fractal(self, scale: float, octaves: int = 3) -> np.ndarray:
        """Smooth noise (H, W), mean 0, spread about 1, its largest features `scale` px wide."""
        layers = [
            _noise(self.rng, self.width, self.height, max(scale / 2**octave, 1.5)) / 2**octave
            for octave in range(octaves)
        ]
        return sum(layers) / math.sqrt(sum(0.25**octave for octave in range(octaves)))

    def render(self) -> Image.Image:
        """Turn concentrations into light, with the blur of a lens and the noise of a sensor."""
        strength = self.rng.normal(1.0, 0.06, 2)
        density = (
            self.haematoxylin[..., None] * _HAEMATOXYLIN * strength[0]
            + self.eosin[..., None] * _EOSIN * strength[1]
        )
        light = 246.0 * np.exp(-density)
        image = Image.fromarray(light.clip(0, 255).astype(np.uint8))
        blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)
        noisy = blurred + self.rng.normal(0, 1.6, blurred.shape)
        return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _noise(rng: np.random.Generator, width: int, height: int, scale: float) -> np.ndarray:
    # Nodes lie `scale` px apart; two more on each side keep the cubic away from its border.
    columns, rows = math.ceil(width / scale) + 4, math.ceil(height / scale) + 4
    nodes = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    left, top = rng.uniform(1, 2, 2)
    box = (left, top, left + width / scale, top + height / scale)
    return np.asarray(nodes.resize((width, height), Image.Resampling.BICUBIC, box=box)) * 1.4


def _smoothstep(low: float, high: float, value: np.ndarray) -> np.ndarray:
    ramp = ((value - low) / (high - low)).clip(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _blend(target: np.ndarray, mask: np.ndarray, value: Any) -> None:
    target += mask * (value - target)


# --- what tissue is made of


def _draw_stroma(section: _Section, density: float) -> np.ndarray:
    """Fill the section with wavy collagen; returns the local direction of the fibres (H, W) in radians."""
    angle = section.rng.uniform(0, math.pi)
    across = section.x * math.cos(angle) + section.y * math.sin(angle)
    phase = across / 34 + 1.3 * section.fractal(190, 2) + 0.13 * section.fractal(28, 2)
    bundle = 0.5 + 0.5 * np.sin(2 * math.pi * phase)
    fibril = 0.5 + 0.5 * np.sin(2 * math.pi * (4.3 * phase + 0.35 * section.fractal(16, 2)))
    eosin = density * (0.26 + 0.34 * bundle**1.5 + 0.13 * fibril + 0.08 * section.fractal(60))
    cleft = _smoothstep(0.13, 0.0, bundle + 0.17 * section.fractal(22, 2) + 0.1)
    section.eosin[:] = (eosin * (1 - 0.9 * cleft)).clip(0.015, None)
    section.haematoxylin[:] = (0.045 + 0.02 * section.fractal(70)).clip(0, None) * (1 - cleft)
    rise_y, rise_x = np.gradient(phase)
    return np.arctan2(rise_y, rise_x) + math.pi / 2


def _draw_nucleus(
    section: _Section,
    x: float,
    y: float,
    long: float,
    short: float,
    angle: float,
    stain: float,
    open_: float = 0.0,
) -> None:
    """Draw a nucleus with half axes `long` and `short` px; `open_` 0 is dense, 1 pale with a nucleolus."""
    window = section.window(x, y, long * 1.3 + 2)
    dx, dy = section.x[window] - x, section.y[window] - y
    if dx.size == 0:
        return
    along = (dx * math.cos(angle) + dy * math.sin(angle)) / long
    aside = (dy * math.cos(angle) - dx * math.sin(angle)) / short
    bumps = section.rng.uniform(-0.05, 0.05, 2)
    turn = np.arctan2(aside, along)
    radius = np.hypot(along, aside) * (1 + bumps[0] * np.cos(2 * turn + 1) + bumps[1] * np.cos(3 * turn))
    edge = 0.9 / short
    inside = _smoothstep(1 + edge, 1 - edge, radius)
    shade = _nuclear_shade(section, radius, along, aside, open_)
    _blend(section.haematoxylin[window], inside, stain * shade)
    _blend(section.eosin[window], inside, 0.28)


def _nuclear_shade(section: _Section, radius: Any, along: Any, aside: Any, open_: float) -> np.ndarray:
    height, width = radius.shape
    limit = section.chromatin.shape[0] - max(height, width)
    top, left = section.rng.integers(0, max(limit, 1), 2)
    texture = section.chromatin[top : top + height, left : left + width]
    rim = _smoothstep(0.55, 0.95, radius)
    shade = 1 - open_ * 0.5 * (1 - rim) + (0.09 + 0.09 * open_) * texture
    if open_ > 0.3:
        spot_x, spot_y = section.rng.uniform(-0.35, 0.35, 2)
        shade = shade + 0.75 * open_ * _smoothstep(0.3, 0.12, np.hypot(along - spot_x, aside - spot_y))
    return shade.clip(0.25, 1.7)


def _scatter(section: _Section, spacing: float, margin: float = 6.0) -> np.ndarray:
    """Points (P, 2) about `spacing` px apart: a jittered hexagonal lattice, in random order."""
    rows = np.arange(-margin, section.height + margin, spacing * 0.87)
    columns = np.arange(-margin, section.width + margin, spacing)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + (np.arange(len(rows)) % 2)[:, None] * spacing / 2
    points = np.stack([x, y], axis=-1).reshape(-1, 2)
    points += section.rng.uniform(-0.34, 0.34, points.shape) * spacing
    return section.rng.permutation(points)


def _at(section: _Section, field: np.ndarray, x: float, y: float) -> float:
    row = min(max(int(y), 0), section.height - 1)
    return float(field[row, min(max(int(x), 0), section.width - 1)])


def _draw_stromal_cells(section: _Section, direction: np.ndarray, spacing: float, free: np.ndarray) -> None:
    """Spindle nuclei along the fibres, and a few lymphocytes, where `free` (H, W) is True."""
    crowd = section.fractal(110, 2)
    for x, y in _scatter(section, spacing):
        if not _at(section, free, x, y):
            continue
        if section.rng.random() < 0.16 + 0.16 * _at(section, crowd, x, y):
            radius = section.rng.uniform(4.6, 5.8)
            _draw_nucleus(section, x, y, radius, radius * 0.93, 0, section.rng.uniform(1.45, 1.75))
        elif section.rng.random() < 0.75:
            angle = _at(section, direction, x, y) + section.rng.normal(0, 0.12)
            long, short = section.rng.uniform(8, 14), section.rng.uniform(2.1, 3.3)
            _draw_nucleus(section, x, y, long, short, angle, section.rng.uniform(1.05, 1.4))


@dataclass(frozen=True)
class _Textures:
    """Noise (H, W) that all glands of a section share: new noise for each would take most of the time."""

    ragged: np.ndarray
    fine: np.ndarray
    secretion: np.ndarray


def _draw_gland(section: _Section, textures: _Textures, x: float, y: float, radius: float) -> None:
    """Draw a gland: lumen, tall cells with nuclei at their base, a thin sheath."""
    rng = section.rng
    order = np.arange(1, 6)
    swing, shift = rng.normal(0, 0.17, 5) / order**0.9, rng.uniform(0, 2 * math.pi, 5)

    def outline(turn: Any) -> Any:
        return radius * (1 + (swing * np.cos(order * turn[..., None] + shift)).sum(-1))

    window = section.window(x, y, radius * (1 + np.abs(swing).sum()) + 6)
    dx, dy = section.x[window] - x, section.y[window] - y
    depth = outline(np.arctan2(dy, dx)) - np.hypot(dx, dy)  # px inside the outline, negative outside
    tall = min(rng.uniform(22, 28), radius * 0.62)
    _draw_epithelium(section, textures, window, depth, tall)
    _draw_basal_nuclei(section, x, y, outline, tall)


def _draw_epithelium(section: _Section, textures: _Textures, window: Any, depth: np.ndarray, tall: float) -> None:
    eosin, haematoxylin = section.eosin[window], section.haematoxylin[window]
    ragged, fine = textures.ragged[window], textures.fine[window]
    inside = _smoothstep(-1.5, 1.0, depth)
    apical = _smoothstep(0.35, 0.85, depth / tall + 0.1 * ragged)
    _blend(eosin, inside, 0.44 - 0.2 * apical + 0.05 * fine)
    _blend(haematoxylin, inside, 0.30 - 0.18 * apical + 0.03 * fine)
    brush = depth - tall + 1.6 * ragged
    eosin += 0.13 * _smoothstep(-3.5, -1, brush) * _smoothstep(2.5, 0, brush)
    lumen = _smoothstep(-0.5, 2.0, brush)
    secretion = 0.11 * _smoothstep(0.2, 1.6, textures.secretion[window]) + 0.012
    _blend(eosin, lumen, secretion)
    _blend(haematoxylin, lumen, 0.25 * secretion)
    sheath = _smoothstep(-4.5, -1.5, depth) * _smoothstep(1.5, -1.5, depth)
    _blend(eosin, 0.7 * sheath, 0.62)


def _draw_basal_nuclei(section: _Section, x: float, y: float, outline: Callable[[Any], Any], tall: float) -> None:
    rng = section.rng
    turn = rng.uniform(0, 0.1)
    while turn < 2 * math.pi:
        border = float(outline(np.array(turn)))
        ahead = float(outline(np.array(turn + 0.05)))
        normal = turn - math.atan2(ahead - border, 0.05 * border)
        inset = tall * rng.normal(0.33, 0.07)
        distance = border - inset
        place_x, place_y = x + distance * math.cos(turn), y + distance * math.sin(turn)
        long, short = tall * rng.uniform(0.25, 0.33), rng.uniform(3.9, 4.9)
        angle = normal + rng.normal(0, 0.14)
        _draw_nucleus(
            section, place_x, place_y, long, short, angle, rng.uniform(1.0, 1.35), rng.uniform(0.1, 0.45)
        )
        turn += rng.uniform(7.6, 10.5) / max(distance, 6.0)


def _cut_edge(section: _Section) -> None:
    """Let the tissue end, with a frayed border, at one corner of the image: beyond it is glass."""
    angle = section.rng.uniform(0, 2 * math.pi)
    half = 0.5 * math.hypot(section.width, section.height)
    across = (section.x - section.width / 2) * math.cos(angle) + (section.y - section.height / 2) * math.sin(
        angle
    )
    glass = _smoothstep(-2, 3, across - 0.66 * half + 26 * section.fractal(130) + 1.5 * section.fractal(6, 2))
    _blend(section.eosin, glass, 0.008)
    _blend(section.haematoxylin, glass, 0.006)


# --- kinds of tissue


def _glands(section: _Section) -> None:
    direction = _draw_stroma(section, density=0.85)
    _draw_stromal_cells(section, direction, 21, np.ones((section.height, section.width), bool))
    textures = _Textures(section.fractal(9, 2), section.fractal(5, 2), section.fractal(46))
    for x, y in _scatter(section, 160, margin=30):
        _draw_gland(section, textures, x, y, section.rng.uniform(44, 74))
    _cut_edge(section)


def _stroma(section: _Section) -> None:
    direction = _draw_stroma(section, density=1.0)
    _draw_stromal_cells(section, direction, 30, np.ones((section.height, section.width), bool))


def _solid(section: _Section) -> None:
    direction = _draw_stroma(section, density=0.8)
    field = section.fractal(150, 2) + 0.75
    nest = _smoothstep(-0.06, 0.06, field + 0.05 * section.fractal(12, 2))
    _draw_stromal_cells(section, direction, 20, nest < 0.5)
    _blend(section.eosin, nest, 0.40 + 0.06 * section.fractal(9))
    _blend(section.haematoxylin, nest, 0.27 + 0.06 * section.fractal(24))
    for x, y in _scatter(section, 19):
        if _at(section, nest, x, y) > 0.6:
            _draw_tumour_nucleus(section, x, y)


def _draw_tumour_nucleus(section: _Section, x: float, y: float) -> None:
    rng = section.rng
    short = rng.uniform(5.5, 8.5)
    long, stain, open_ = short * rng.uniform(1.05, 1.6), rng.uniform(0.95, 1.4), rng.uniform(0.3, 1.0)
    if rng.random() < 0.04:  # a dividing or dying cell: small and almost black
        short, long, stain, open_ = 3.2, rng.uniform(4, 7), 2.0, 0.0
    _draw_nucleus(section, x, y, long, short, rng.uniform(0, math.pi), stain, open_)


TISSUE_KINDS = {"glands": _glands, "stroma": _stroma, "solid": _solid}
