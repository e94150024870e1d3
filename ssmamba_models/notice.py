"""What the package warns of."""

from __future__ import annotations


class SSMambaWarning(UserWarning):
    """Something that a person should know and that stops nothing; the `ssmamba` commands print it as one line."""
