"""What the package tells a person beside its results: warnings, and errors in one line."""

from __future__ import annotations


class SSMambaWarning(UserWarning):
    """Something that a person should know and that stops nothing; the `ssmamba` commands print it as one line."""


def first_line(error: BaseException | str) -> str:
    """An exception, or its text, in one line, for a message that names the cure."""
    nothing = "no message" if isinstance(error, str) else type(error).__name__
    return (str(error).strip().splitlines() or [nothing])[0]
