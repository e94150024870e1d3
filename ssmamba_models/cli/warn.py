"""Warnings as a person at a terminal wants them: one line, no source code."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import click

from ssmamba_models.notice import SSMambaWarning


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print what this package warns of as `Warning: ...` on stderr; leave all other warnings as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SSMambaWarning)
        default = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, SSMambaWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                default(message, category, *rest, **more)

        warnings.showwarning = show
        yield
