"""Any image mode that microscopes, viewers and converters write, brought to 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Slides are white where there is no tissue, so that is what a transparent pixel shows.
_BACKGROUND = (255, 255, 255)

_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any common mode to RGB.

    Transparent pixels become white, as glass without tissue is. 16-bit grey is scaled by its full range
    (65535 -> 255), not by its content, so that two tiles stay comparable. Of a file with several frames
    the current one is taken (Pillow opens the first).

    Args:
        image: a PIL image of any mode.

    Returns:
        The image in mode RGB, same size.

    Raises:
        ValueError: the mode has no defined range (32-bit integers beyond 16 bits, floats) or no conversion.
        OSError: the image data cannot be decoded.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_rgb(image)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _flatten(image)
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    if image.mode == "F" or samples.min() < 0 or samples.max() > 65535:
        raise ValueError(
            f"grey samples of mode {image.mode} from {samples.min():g} to {samples.max():g} have no defined "
            "white; save the tile with 8 or 16 bits per channel"
        )
    return Image.fromarray((samples / 257 + 0.5).astype(np.uint8)).convert("RGB")


def _flatten(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    flat = Image.new("RGB", layer.size, _BACKGROUND)
    flat.paste(layer, mask=layer.getchannel("A"))
    return flat
