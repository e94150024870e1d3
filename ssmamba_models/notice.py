"""What the package tells a person beside its results: warnings, and errors in one line."""

from __future__ import annotations


class SSMambaWarning(UserWarning):
    """Something that a person should know and that stops nothing; the `ssmamba` commands print it as one line."""


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException | str) -> str:
    """The first line of an exception, or of its text, for a message that names the cure."""
    nothing = "no message" if isinstance(error, str) else type(error).__name__
    return (str(error).strip().splitlines() or [nothing])[0]
