"""Which series a DICOM file belongs to: the files of one slide have one SeriesInstanceUID.

Layout: DICOM PS3.10 section 7.1 (preamble, file meta information) and PS3.5 section 7 (data elements, sequences).
"""

from __future__ import annotations

import os
import re
import struct
from typing import BinaryIO

_TRANSFER_SYNTAX, _SERIES = 0x0002_0010, 0x0020_000E
_ITEM_END, _SEQUENCE_END = 0xFFFE_E00D, 0xFFFE_E0DD
_IMPLICIT = b"1.2.840.10008.1.2"
_UNDEFINED = 0xFFFF_FFFF
# Value representations whose length takes four bytes, after two that are reserved.
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_UID = re.compile(rb"[0-9.]{1,64}")

# Before the series' UID a file has some dozens of elements; more means that these bytes are none.
_MOST_ELEMENTS = 10_000


def series_uid(path: str | os.PathLike) -> str | None:
    """The SeriesInstanceUID of a DICOM file.

    Args:
        path: the file; only its head is read.

    Returns:
        The UID; None where the file is no DICOM, is cut short, says none, or is stored in a rare way (deflated, or with
        the high bytes first).

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
        try:
            found = _find(file)
        except struct.error:  # the file ends
            return None
    return found.decode() if found is not None and _UID.fullmatch(found) else None


def _find(file: BinaryIO) -> bytes | None:
    syntax = b""
    # Whether representations are written out: in the data set, and in each sequence and item that is open.
    explicit = [True]
    for _ in range(_MOST_ELEMENTS):
        group, element = struct.unpack("<HH", file.read(4))
        tag, outermost = group << 16 | element, len(explicit) == 1
        if outermost:
            if tag > _SERIES:  # they are sorted
                return None
            explicit[0] = group == 2 or syntax != _IMPLICIT
        representation, length = _length(file, explicit[-1] and group != 0xFFFE)
        if tag in (_ITEM_END, _SEQUENCE_END):
            explicit.pop()
        elif length == _UNDEFINED:
            explicit.append(explicit[-1] and representation != b"UN")
        elif outermost and tag in (_TRANSFER_SYNTAX, _SERIES):
            value = file.read(min(length, 128)).rstrip(b"\0 ")
            if tag == _SERIES:
                return value
            syntax = value
        else:
            file.seek(length, os.SEEK_CUR)
    return None


def _length(file: BinaryIO, explicit: bool) -> tuple[bytes, int]:
    """An element's representation, b"" where it is not written out, and the bytes of its value."""
    if not explicit:
        return b"", struct.unpack("<L", file.read(4))[0]
    representation, short = struct.unpack("<2sH", file.read(4))
    return representation, struct.unpack("<L", file.read(4))[0] if representation in _LONG else short
