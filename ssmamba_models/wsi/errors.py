"""What can be wrong with a slide, as a whole or in one place."""

from __future__ import annotations


class SlideError(ValueError):
    """A slide that cannot be used; the message names it, what was expected and the cure."""


class EmptySlideError(SlideError):
    """The file holds no byte."""


class NotASlideError(SlideError):
    """No reader knows the file."""


class TruncatedSlideError(SlideError):
    """The file ends before the pixels that its own directory lists."""


class UnsupportedSlideError(SlideError):
    """An image, but not one that can be read as an RGB slide (fluorescence, a stack, floating point, ...)."""


class MissingMppError(SlideError):
    """Nothing in the file says how large a pixel is."""


class TileError(ValueError):
    """One place of a slide cannot be decoded; other places may be read as before.

    Attributes:
        x, y: top-left corner of the region asked for, level-0 px.
        reason: what the decoder says, one line.
    """

    def __init__(self, x: float, y: float, reason: str):
        # The three arguments are kept as they are, so that the error travels between processes.
        super().__init__(x, y, reason)
        self.x, self.y, self.reason = x, y, reason

    def __str__(self) -> str:
        return f"the region at level-0 pixel ({self.x:g}, {self.y:g}) cannot be read: {self.reason}"
