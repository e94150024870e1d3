"""Token maps: what a model makes of each place of an image, as a picture that needs no plotting library."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

_GAP, _CAPTION = 12, 30
# Dark violet over teal to yellow: ordered by lightness too, so that it survives a grey print.
_COLOURS = np.array([(48, 18, 92), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32)


@torch.inference_mode()
def token_grid(model: nn.Module, images: torch.Tensor, stride: int = 16) -> torch.Tensor:
    """The tokens of a model's deepest map that is not coarser than `stride`.

    Args:
        model: a timm model with `forward_intermediates`.
        images: (B, 3, H, W), transformed, on the model's device.
        stride: pixels per token at most; a model that has only coarser maps gives its last one.

    Returns:
        (B, h, w, C) float32 on the CPU.

    Raises:
        ValueError: the model has no `forward_intermediates`, or it does not return maps.
    """
    forward = getattr(model, "forward_intermediates", None)
    if forward is None:
        raise ValueError(
            f"{type(model).__name__} has no forward_intermediates, so there is no token map; "
            "choose another model (all ssmamba models have it)"
        )
    maps = forward(images, intermediates_only=True, output_fmt="NCHW")
    maps = [grid for grid in maps if grid.ndim == 4]
    if not maps:
        raise ValueError(f"{type(model).__name__} returns no two-dimensional maps; choose another model")
    fine = [grid for grid in maps if grid.shape[-1] * stride >= images.shape[-1]]
    return (fine or maps)[-1].permute(0, 2, 3, 1).float().cpu()


def principal_colours(tokens: torch.Tensor) -> np.ndarray:
    """Show tokens by their first three principal components, as red, green and blue.

    Args:
        tokens: (h, w, C).

    Returns:
        (h, w, 3) uint8; each component stretched from its 1st to its 99th percentile, both taken without the
        outermost tokens. Tokens that do not differ give mid grey.
    """
    height, width, _ = tokens.shape
    inner = _without_border(tokens).flatten(0, 1).double()
    mean = inner.mean(dim=0)
    _, _, axes = torch.linalg.svd(inner - mean, full_matrices=False)
    # The sign of an axis is arbitrary; fixing it keeps the picture the same on every machine.
    axes = axes[:3] * torch.where(((inner - mean) @ axes[:3].T).pow(3).sum(dim=0) < 0, -1.0, 1.0)[:, None]
    low, high = np.percentile(((inner - mean) @ axes.T).numpy(), (1, 99), axis=0)
    parts = ((tokens.flatten(0, 1).double() - mean) @ axes.T).numpy()
    spread = high - low
    shown = np.where(spread > 1e-9, (parts - low) / np.maximum(spread, 1e-9), 0.5)
    colours = np.full((height * width, 3), 128, np.uint8)
    colours[:, : shown.shape[1]] = (shown.clip(0, 1) * 255).round()
    return colours.reshape(height, width, 3)


def _without_border(tokens: torch.Tensor) -> torch.Tensor:
    # The outermost tokens see the zero padding: they differ from all others, and would take all the colours.
    return tokens[1:-1, 1:-1] if min(tokens.shape[:2]) >= 8 else tokens


def token_similarity(tokens: torch.Tensor, row: int, column: int) -> np.ndarray:
    """Cosine similarity of every token to one of them.

    The mean token is subtracted first: what all tokens share says nothing about where one is.

    Args:
        tokens: (h, w, C).
        row, column: the place of the token that the others are compared with.

    Returns:
        (h, w) float32 in [-1, 1].
    """
    centred = tokens - tokens.mean(dim=(0, 1))
    unit = nn.functional.normalize(centred, dim=-1)
    return (unit @ unit[row, column]).clamp(-1, 1).numpy()


def draw_token_map(image: Image.Image, tokens: torch.Tensor, point: tuple[int, int] | None = None) -> Image.Image:
    """Draw an image, its tokens' principal components and their similarity to one token, side by side.

    Args:
        image: what the model saw, mode RGB.
        tokens: (h, w, C), the tokens of that image, covering it evenly.
        point: (x, y) in pixels of the image; the similarity is to the token there. None takes the centre.

    Returns:
        One PIL image of mode RGB with a caption under each of the three panels.

    Raises:
        ValueError: the point lies outside the image.
    """
    width, height = image.size
    x, y = point or (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"the point ({x}, {y}) lies outside the image of {width} x {height} px")
    rows, columns = tokens.shape[:2]
    row, column = y * rows // height, x * columns // width
    similarity = token_similarity(tokens, row, column)
    zoom = max(1, round(512 / max(width, height)))
    panels = [
        (image, f"input, {width} x {height} px"),
        (Image.fromarray(principal_colours(tokens)), f"{rows} x {columns} tokens, 3 principal components"),
        (_heat_map(image, similarity), "similarity to the marked token, violet 0, yellow 1"),
    ]
    size = (width * zoom, height * zoom)
    drawn = [(_fit(panel, size), caption) for panel, caption in panels]
    for panel, _ in (drawn[0], drawn[2]):
        _mark(panel, (column + 0.5) * size[0] / columns, (row + 0.5) * size[1] / rows)
    return _side_by_side(drawn)


def _heat_map(image: Image.Image, similarity: np.ndarray) -> Image.Image:
    level = (similarity.clip(0, 1) * (len(_COLOURS) - 1)).astype(np.float32)
    below = np.minimum(level.astype(int), len(_COLOURS) - 2)
    part = (level - below)[..., None]
    colours = (_COLOURS[below] * (1 - part) + _COLOURS[below + 1] * part).astype(np.uint8)
    heat = _fit(Image.fromarray(colours), image.size)
    # A hint of the tissue under the colours shows which structure a token belongs to.
    return Image.blend(heat, image.convert("L").convert("RGB"), 0.25)


def _fit(panel: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Enlarged without smoothing: a token is a square, and what lies between tokens was not computed.
    return panel.resize(size, Image.Resampling.NEAREST)


def _mark(panel: Image.Image, x: float, y: float) -> None:
    draw = ImageDraw.Draw(panel)
    for radius, colour, line in ((11, "black", 5), (10, "white", 3)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=line)


def _side_by_side(panels: list[tuple[Image.Image, str]]) -> Image.Image:
    width, height = panels[0][0].size
    sheet = Image.new("RGB", (len(panels) * (width + _GAP) + _GAP, height + 2 * _GAP + _CAPTION), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for index, (panel, caption) in enumerate(panels):
        left = _GAP + index * (width + _GAP)
        sheet.paste(panel, (left, _GAP))
        draw.text((left, height + 1.5 * _GAP), caption, fill="black", font=font)
    return sheet
