"""The geometry of a foreign feature file: what it states, what the user gives, and what follows from the two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ssmamba_models.data.tile_geometry import GEOMETRY, clean, level0_side

_MPP_OPTIONS = "--mpp-override, --mpp or --mpp-csv"
_OPTIONS = {
    "level0_mpp": _MPP_OPTIONS,
    "target_mpp": _MPP_OPTIONS,
    "patch_size": "--tile-size",
    "patch_size_level0": f"--tile-size, and {_MPP_OPTIONS}",
    "overlap": "--overlap",
    "level0_width": "a column level0_width in --mpp-csv",
    "level0_height": "a column level0_height in --mpp-csv",
}


def complete_geometry(stated: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our geometry from what a file states and what the user gives; what follows is computed, nothing is guessed.

    Args:
        stated: the file's, any of `GEOMETRY`.
        given: the user's, any of `GEOMETRY` (other keys are passed over).
        where: the file, for messages.

    Raises:
        ValueError: something is missing (the message names the options that give it), or two statements disagree.
    """
    known = {name: clean(name, value, where) for name, value in stated.items()}
    for name in GEOMETRY:
        if name in given:
            value = clean(name, given[name], where)
            _check_agreement(name, known.setdefault(name, value), value, where)
    _derive_scale(known, where)
    missing = [name for name in GEOMETRY if name not in known]
    if missing:
        needed = "; ".join(f"{name} ({GEOMETRY[name]}): give {_OPTIONS[name]}" for name in missing)
        raise ValueError(f"{where} does not say {needed}")
    return known


def _check_agreement(name: str, stated: Any, given: Any, where: str) -> None:
    same = stated == given if isinstance(stated, str) else math.isclose(stated, given, rel_tol=1e-3)
    if not same:
        raise ValueError(f"{where} says that {name} is {stated}, not {given}; leave the option out, or mend the file")


def _derive_scale(known: dict[str, Any], where: str) -> None:
    # patch_size * target_mpp = patch_size_level0 * level0_mpp: any three give the fourth.
    side, side0 = known.get("patch_size"), known.get("patch_size_level0")
    level0, target = known.get("level0_mpp"), known.get("target_mpp")
    if side and level0 and target and side0 is None:
        known["patch_size_level0"] = level0_side(side, target, level0)
    elif side and side0 and level0 and target is None:
        known["target_mpp"] = level0 * side0 / side
    elif side and side0 and target and level0 is None:
        known["level0_mpp"] = target * side / side0
    elif side and side0 and level0 and target:
        expected = level0_side(side, target, level0)
        if abs(expected - side0) > max(1.0, 0.01 * side0):
            raise ValueError(
                f"{where}: tiles of {side} px at {target:g} um/px are {expected:g} px wide on a level 0 of {level0:g} "
                f"um/px, but the file says {side0:g}; give one mpp, and the other follows from it"
            )
