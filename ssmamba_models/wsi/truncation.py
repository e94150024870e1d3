"""Find a cut-short TIFF (SVS, NDPI, SCN, BIF, OME-TIFF, ...) by its directory, before any pixel is read.

A copy that stopped midway opens in every reader and fails hours later at the first missing tile, or shows grey. The
file's own lists of offsets and byte counts tell at once. Layout: TIFF 6.0, section 2; BigTIFF; Hamamatsu's variant
with 64-bit offsets.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ssmamba_models.wsi.errors import TruncatedSlideError

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_STRIPS, _TILES, _SUB_IFDS = (273, 279), (324, 325), 330

# A directory of a real file holds some dozens of entries; more means that these bytes are no directory.
_MOST_ENTRIES = 4096


@dataclass(frozen=True)
class _Variant:
    """How numbers lie in a TIFF file: classic, Big, or Hamamatsu's (classic, with high words after the directory)."""

    order: str
    big: bool
    ndpi: bool

    @property
    def count(self) -> struct.Struct:
        return struct.Struct(self.order + ("Q" if self.big else "H"))

    @property
    def entry(self) -> struct.Struct:
        return struct.Struct(self.order + ("HHQ8s" if self.big else "HHL4s"))

    @property
    def offset(self) -> struct.Struct:
        return struct.Struct(self.order + ("Q" if self.big or self.ndpi else "L"))


@dataclass(frozen=True)
class _Entry:
    type: int
    count: int
    value: bytes
    high: int


def is_tiff(path: str | os.PathLike) -> bool:
    """Whether a file begins as a TIFF or BigTIFF does, whatever its suffix."""
    with open(path, "rb") as file:
        return _variant(file, path) is not None


def check_not_truncated(path: str | os.PathLike) -> None:
    """Make sure that all pixels which a TIFF-based file lists lie within it.

    Files of other kinds (MIRAX, DICOM, PNG, ...) pass: they have no such list.

    Args:
        path: the file.

    Raises:
        TruncatedSlideError: the file ends before its directory or its last strip or tile.
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        variant = _variant(file, path)
        if variant is None:
            return
        end = _data_end(file, variant, size)
    if end > size:
        raise TruncatedSlideError(
            f"{os.fspath(path)!r} is truncated: it has {size:,} bytes and its directory needs at least {end:,}; "
            "copy or export it again"
        )


def _variant(file: BinaryIO, path: str | os.PathLike) -> _Variant | None:
    head = file.read(4)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 4:
        return None
    (version,) = struct.unpack(order + "H", head[2:])
    if version not in (42, 43):
        return None
    ndpi = version == 42 and order == "<" and os.fspath(path).lower().endswith(".ndpi")
    return _Variant(order, version == 43, ndpi)


def _data_end(file: BinaryIO, variant: _Variant, size: int) -> int:
    """One past the last byte that the file's directories speak of; the walk ends where the file does."""
    end, seen = 8, set()
    queue = [_first_directory(file, variant, size)]
    while queue:
        at = queue.pop()
        if at == 0 or at in seen:
            continue
        seen.add(at)
        entries, following, stop = _directory(file, variant, at, size)
        end = max(end, stop)
        for tag, entry in entries.items():
            end = max(end, _value_place(variant, entry)[1])
            if tag == _SUB_IFDS:
                queue.extend(int(offset) for offset in _numbers(file, variant, entry, size))
        end = max(end, *(_pixels_end(file, variant, entries, tags, size) for tags in (_STRIPS, _TILES)))
        queue.append(following)
    return end


def _first_directory(file: BinaryIO, variant: _Variant, size: int) -> int:
    file.seek(8 if variant.big else 4)
    packed = variant.offset
    return packed.unpack(file.read(packed.size))[0] if size >= file.tell() + packed.size else size + 1


def _directory(file: BinaryIO, variant: _Variant, at: int, size: int) -> tuple[dict[int, _Entry], int, int]:
    """The entries of the directory at an offset, where the next one lies, and one past this one's last byte."""
    if at + variant.count.size > size:
        return {}, 0, at + variant.count.size
    file.seek(at)
    (count,) = variant.count.unpack(file.read(variant.count.size))
    if count > _MOST_ENTRIES:
        return {}, 0, at
    length = count * variant.entry.size
    stop = at + variant.count.size + length + variant.offset.size + (4 * count if variant.ndpi else 0)
    if stop > size:
        return {}, 0, stop
    data = file.read(length)
    (following,) = variant.offset.unpack(file.read(variant.offset.size))
    high = struct.unpack(f"<{count}L", file.read(4 * count)) if variant.ndpi else (0,) * count
    rows = zip(variant.entry.iter_unpack(data), high)
    return {tag: _Entry(kind, many, value, above) for (tag, kind, many, value), above in rows}, following, stop


def _value_place(variant: _Variant, entry: _Entry) -> tuple[int, int]:
    """Where an entry's value begins and ends in the file; (0, 0) where it lies in the entry itself."""
    length = _TYPE_BYTES.get(entry.type, 0) * entry.count
    if length <= len(entry.value):
        return 0, 0
    (low,) = struct.unpack(variant.order + ("Q" if variant.big else "L"), entry.value)
    start = low + (entry.high << 32)
    return start, start + length


def _numbers(file: BinaryIO, variant: _Variant, entry: _Entry, size: int) -> np.ndarray:
    """An entry's value as whole numbers; none where it lies beyond the file's end or is no number."""
    kind = _NUMBERS.get(entry.type)
    start, stop = _value_place(variant, entry)
    if kind is None or stop > size:
        return np.empty(0, np.int64)
    data = entry.value
    if stop:
        file.seek(start)
        data = file.read(stop - start)
    numbers = np.frombuffer(data, variant.order + kind, entry.count).astype(np.int64)
    return numbers + (entry.high << 32) if not stop and entry.count == 1 else numbers


def _pixels_end(
    file: BinaryIO, variant: _Variant, entries: dict[int, _Entry], tags: tuple[int, int], size: int
) -> int:
    if not all(tag in entries for tag in tags):
        return 0
    offsets, counts = (_numbers(file, variant, entries[tag], size) for tag in tags)
    several = min(len(offsets), len(counts))
    ends = (offsets[:several] + counts[:several])[counts[:several] > 0]
    # A count of 0 marks a tile that was never scanned; its offset means nothing.
    return int(ends.max()) if len(ends) else 0
