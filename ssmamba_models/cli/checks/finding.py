"""One thing that `ssmamba doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: the heading that it stands under.
        name: what was looked at.
        status: "ok"; "warning": works, but worth knowing; "problem": broken.
        text: what was found.
        cure: what to do about it; empty where nothing need be done.
    """

    subject: str
    name: str
    status: Literal["ok", "warning", "problem"]
    text: str
    cure: str = ""
