"""Slides assembled from labelled tiles on a grid: known tissue in a known place, to try slide models on.

A mosaic is a rectangle of tiles. How much of it is of each class, and how the classes lie (scattered, or in regions of
one tissue each), is chosen; the tiles of one patient's mosaics come from groups (originals, slides) that no other
patient has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ssmamba_models.data.labelled import LabelledTiles

# Cells over which a region's outline is smoothed, as a part of the mosaic's shorter side.
_SMOOTHING = 0.15


@dataclass(frozen=True)
class MosaicKind:
    """What the mosaics of one label look like.

    Attributes:
        shares: class of tile -> share of the cells, a number or (least, most) to draw from. One class may stand for
            the rest, with None.
        arrangement: "scattered"; "regions": each class in a few connected areas; or "compact": around a random point,
            the classes in the order of `shares`, the first innermost, and the rest outermost.
    """

    shares: Mapping[str, float | tuple[float, float] | None]
    arrangement: Literal["scattered", "regions", "compact"] = "scattered"


@dataclass(frozen=True)
class Mosaic:
    """One assembled slide.

    Attributes:
        name: of the slide.
        patient: whose it is.
        label: the name of its kind.
        tiles: (H, W) int64, for each cell the index of its tile in the `LabelledTiles` it was assembled from.
    """

    name: str
    patient: str
    label: str
    tiles: np.ndarray

    @property
    def places(self) -> np.ndarray:
        """(H * W, 2) int64: column and row of each cell, row by row."""
        rows, columns = np.divmod(np.arange(self.tiles.size), self.tiles.shape[1])
        return np.stack([columns, rows], axis=1)


def assemble_mosaics(
    tiles: LabelledTiles,
    kinds: Mapping[str, MosaicKind],
    *,
    patients: int,
    slides_per_patient: int = 2,
    shape: tuple[int, int] = (12, 12),
    every_label: bool = False,
    tiles_per_class: int | None = None,
    seed: int = 0,
) -> list[Mosaic]:
    """Assemble mosaics from labelled tiles.

    Args:
        tiles: tiles with labels, and by choice groups; without groups each tile is its own.
        kinds: label -> what its mosaics look like.
        patients: number of patients, spread evenly over the labels.
        slides_per_patient: mosaics of each.
        shape: (H, W), tiles of a mosaic.
        every_label: each patient's mosaics have the labels in turn, so that who the patient is tells nothing of the
            label; otherwise all of a patient's have one.
        tiles_per_class: most tiles of a class that a patient's mosaics are made of; None sets no limit.
        seed: the same seed gives the same mosaics.

    Returns:
        patients * slides_per_patient mosaics, patient by patient.

    Raises:
        ValueError: a class has no tiles, fewer groups than patients, or none for one of them as groups have several
            classes; shares that do not make a whole, or tiles_per_class below 1.

    Example:
        >>> tumour = MosaicKind({"lung_n": None, "lung_aca": (0.05, 0.1)})
        >>> kinds = {"benign": MosaicKind({"lung_n": None}), "tumour": tumour}
        >>> mosaics = assemble_mosaics(read_tiles("lc25000"), kinds, patients=40)
    """
    if tiles_per_class is not None and tiles_per_class < 1:
        raise ValueError(f"tiles_per_class is {tiles_per_class}, expected 1 or more, or None")
    rng = np.random.default_rng(seed)
    names = list(kinds)
    classes = sorted({name for kind in kinds.values() for name in kind.shares})
    pools = _pools(tiles, classes, patients, rng)
    if tiles_per_class is not None:
        pools = {name: [rng.permutation(pool)[:tiles_per_class] for pool in each] for name, each in pools.items()}
    mosaics = []
    for patient in range(patients):
        for number in range(slides_per_patient):
            label = names[(patient + number if every_label else patient) % len(names)]
            layout = draw_layout(kinds[label], shape, rng)
            chosen = np.empty(shape, np.int64)
            for name in np.unique(layout):
                cells = layout == name
                chosen[cells] = _draw(pools[name][patient], int(cells.sum()), rng)
            mosaics.append(Mosaic(f"mosaic_{patient:03d}_{number}", f"patient_{patient:03d}", label, chosen))
    return mosaics


def draw_layout(kind: MosaicKind, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw which class each cell of a mosaic is of.

    All arrangements give every class the same number of cells: they differ in where these lie, and in nothing else.

    Args:
        kind: shares and arrangement.
        shape: (H, W).
        rng: of the draw.

    Returns:
        (H, W) class names.

    Raises:
        ValueError: the shares do not make a whole.
    """
    counts = _counts(kind.shares, shape[0] * shape[1], rng)
    names = np.repeat(list(counts), list(counts.values()))
    if kind.arrangement == "scattered":
        return rng.permutation(names).reshape(shape)
    landscapes = {"regions": _landscape, "compact": _funnel}
    if kind.arrangement not in landscapes:
        raise ValueError(f"the arrangement is {kind.arrangement!r}, expected 'scattered', 'regions' or 'compact'")
    # The cells in the order of their height in a smooth landscape: each class takes a band of it.
    layout = np.empty(shape[0] * shape[1], dtype=names.dtype)
    layout[np.argsort(landscapes[kind.arrangement](shape, rng), axis=None, kind="stable")] = names
    return layout.reshape(shape)


def _landscape(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise (H, W)."""
    frequencies = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    blur = np.exp(-2 * (np.pi * frequencies * _SMOOTHING * min(shape)) ** 2)
    return np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * blur, s=shape)


def _funnel(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The distance (H, W) from a random point, a little uneven, so that no outline is a circle."""
    y, x = rng.uniform(0, shape)
    distance = np.hypot(np.arange(shape[0])[:, None] + 0.5 - y, np.arange(shape[1]) + 0.5 - x)
    return distance + rng.normal(0, 0.3, shape)


def _counts(
    shares: Mapping[str, float | tuple[float, float] | None], cells: int, rng: np.random.Generator
) -> dict[str, int]:
    rest = [name for name, share in shares.items() if share is None]
    if len(rest) > 1:
        raise ValueError(f"the shares of {' and '.join(rest)} are None; only one class can stand for the rest")
    drawn = {
        name: rng.uniform(*share) if isinstance(share, Sequence) else share
        for name, share in shares.items()
        if share is not None
    }
    total = sum(drawn.values())
    if min(drawn.values(), default=0) < 0 or total > 1 + 1e-9 or (not rest and abs(total - 1) > 1e-9):
        raise ValueError(
            f"the shares are {dict(shares)}, which add up to {total:g}; expected numbers from 0 that add up to 1, or "
            "to less with None for one more class"
        )
    # Rounded sums: the counts add up to the cells, whatever the shares.
    edges = np.round(np.cumsum([0.0, *drawn.values()]) * cells).astype(int)
    counts = dict(zip(drawn, np.diff(edges)))
    if rest:
        counts[rest[0]] = cells - edges[-1]
    return counts


def _pools(
    tiles: LabelledTiles, classes: Sequence[str], patients: int, rng: np.random.Generator
) -> dict[str, list[np.ndarray]]:
    """For each class the tiles that are each patient's: whole groups, each dealt to one patient."""
    members: dict[str, dict[str, list[int]]] = {name: {} for name in classes}
    for index, (label, unit) in enumerate(zip(tiles.labels or (), tiles.units)):
        if label in members:
            members[label].setdefault(unit, []).append(index)
    for name in classes:
        if not members[name]:
            known = ", ".join(tiles.classes) or "none"
            raise ValueError(f"no tile in {str(tiles.root)!r} is of class {name!r}; there is: {known}")
        if len(members[name]) < patients:
            raise ValueError(
                f"class {name!r} has {len(members[name])} groups, fewer than the {patients} patients, who must not "
                "share one; take fewer patients"
            )
    dealt = _deal(members, patients, rng)
    pools: dict[str, list[np.ndarray]] = {}
    for name, own in members.items():
        each = [[own[unit] for unit in units if unit in own] for units in dealt]
        if not all(each):
            raise ValueError(
                f"the groups with tiles of several classes leave a patient without class {name!r}, as no two of the "
                f"{patients} patients may share a group; take fewer patients"
            )
        pools[name] = [np.concatenate(tiles_of_units) for tiles_of_units in each]
    return pools


def _deal(members: Mapping[str, Mapping[str, list[int]]], patients: int, rng: np.random.Generator) -> list[list[str]]:
    """The groups of each patient, of each class as equally many as can be."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for unit in sorted({unit for own in members.values() for unit in own}):
        kinds.setdefault(tuple(name for name, own in members.items() if unit in own), []).append(unit)
    dealt: list[list[str]] = [[] for _ in range(patients)]
    counts = {name: np.zeros(patients, np.int64) for name in members}
    # Groups of one class come last: they fill up what those of several left uneven.
    for kind in sorted(kinds, key=lambda kind: (-len(kind), kind)):
        for unit in rng.permutation(kinds[kind]):
            patient = int(np.argmin(sum(counts[name] for name in kind)))
            dealt[patient].append(str(unit))
            for name in kind:
                counts[name][patient] += 1
    return dealt


def _draw(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` tiles of a pool, each as often as any other (give or take one)."""
    rounds = [rng.permutation(pool) for _ in range(-(-count // len(pool)))]
    return np.concatenate(rounds)[:count]
