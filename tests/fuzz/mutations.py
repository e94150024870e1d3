"""Broken files: bytes turned, lost, doubled and cut off, and tables that no program should write."""

from __future__ import annotations

import csv
import io

from hypothesis import strategies as st

_ODD = st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff" * 8, b"\x01", b"-"])


@st.composite
def broken_bytes(draw, data: bytes, most: int = 4) -> bytes:
    """A file's content after up to `most` accidents; heads are hit more often than their share."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        if not content:
            break
        last = len(content) - 1
        place = draw(
            st.one_of(st.integers(0, min(last, 1024)), st.integers(0, last), st.integers(max(0, last - 512), last))
        )
        kind = draw(st.sampled_from(["flip", "flip", "flip", "odd", "noise", "zeros", "cut", "lose", "double"]))
        _damage(draw, content, place, kind)
    return bytes(content)


def _damage(draw, content: bytearray, place: int, kind: str) -> None:
    length = draw(st.integers(1, 64))
    if kind == "flip":
        content[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "odd":
        new = draw(_ODD)
        content[place : place + len(new)] = new
    elif kind == "noise":
        new = draw(st.binary(min_size=1, max_size=16))
        content[place : place + len(new)] = new
    elif kind == "zeros":
        content[place : place + length] = bytes(min(length, len(content) - place))
    elif kind == "cut":
        del content[place:]
    elif kind == "lose":
        del content[place : place + length]
    else:
        content[place:place] = content[place : place + length]


_CELLS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "a",
            "b",
            "c",
            "a.tif",
            "0",
            "1",
            "2.0",
            "-1",
            "1e400",
            "nan",
            "inf",
            "0.5",
            "train",
            "val",
            "TEST",
            "p1",
        ]
        + [
            "a\0b",
            "a\nb",
            'a"b',
            "a,b",
            "é",
            "ß" * 300,
            "x" * 200_000,
            "../a",
            "/a",
            "\ufeffa",
            "\u202ea",
            "\ud7ff",
            "=1+1",
        ]
    ),
    st.text(max_size=8),
)
_ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\r\r\n"])
_CODES = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32"])


@st.composite
def odd_tables(draw, columns: list[str], good: dict[str, list[str]]) -> bytes:
    """A CSV file of these columns (some lost, doubled, renamed) with good and odd cells, in some encoding.

    Args:
        columns: names that a reader knows.
        good: column -> entries that make sense.
    """
    header = draw(
        st.lists(st.sampled_from([*columns, *columns, "notes", "", columns[0].upper()]), min_size=1, max_size=8)
    )
    if draw(st.booleans()):
        header = list(columns)
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        sound = draw(st.integers(0, 3)) > 0
        rows.append([draw(st.sampled_from(good[name]) if sound and name in good else _CELLS) for name in header])
    if rows and draw(st.integers(0, 9)) == 0:
        rows[-1] = rows[-1][:-1] + ["", "", ""]
    text = io.StringIO(newline="")
    dialect = {"delimiter": draw(st.sampled_from([",", ",", ",", ";", "\t"])), "lineterminator": draw(_ENDS)}
    csv.writer(text, quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])), **dialect).writerows(
        [header, *rows]
    )
    content = text.getvalue()
    if draw(st.integers(0, 9)) == 0:
        content += draw(st.sampled_from(['"', '"open', "\0", "a,b,c,d,e,f,g,h,i", "\x1a"]))
    data = content.encode(draw(_CODES), "replace")
    return draw(broken_bytes(data)) if draw(st.integers(0, 4)) == 0 else data
