"""What PAMA's masked autoencoder is shown of a slide, and batches of slides of different sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmamba_models.slide.pama import PAMA
from ssmamba_models.slide.pama_geometry import pad_stack, slide_geometry
from ssmamba_models.slide.slide_tiles import SlideTiles
from ssmamba_models.slide.tile_sample import sample_tiles


class PamaViews:
    """One view of a slide for `PamaPretraining`: at most `max_tiles` of its tiles, their geometry, and what is random.

    Args:
        max_tiles: most tiles; of larger slides as many are drawn.
        tiles_per_anchor, max_anchors, polar_bins: of `slide_geometry`; the encoder's. See `of`.

    Returns of a call: features (N, D), grid (N, 2); distance and polar (K, N), anchors and anchor_mask (K,), see
        `PamaGeometry`; noise (N,) and anchor_noise (K,), uniform in 0..1, which decide what tiles are hidden and what
        anchors left out. Everything random comes from the generator that is given.

    Raises:
        ValueError: an argument below 1; when called, coordinates that are missing.
    """

    def __init__(
        self, max_tiles: int = 2048, tiles_per_anchor: int = 144, max_anchors: int = 128, polar_bins: int = 8
    ) -> None:
        for name, value in (
            ("max_tiles", max_tiles),
            ("tiles_per_anchor", tiles_per_anchor),
            ("max_anchors", max_anchors),
            ("polar_bins", polar_bins),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        self.max_tiles, self.tiles_per_anchor = max_tiles, tiles_per_anchor
        self.max_anchors, self.polar_bins = max_anchors, polar_bins

    @classmethod
    def of(cls, encoder: PAMA, max_tiles: int | None = None) -> PamaViews:
        """The views that an encoder reads; of fewer tiles, where `max_tiles` says so, to train in less memory."""
        most = encoder.max_tiles if max_tiles is None else max_tiles
        return cls(most, encoder.tiles_per_anchor, encoder.max_anchors, encoder.polar_bins)

    def __call__(self, slide: SlideTiles, generator: torch.Generator) -> dict[str, Tensor]:
        place = sample_tiles(len(slide), self.max_tiles, generator)
        grid = slide.grid[place]
        geometry = slide_geometry(grid, self.tiles_per_anchor, self.max_anchors, self.polar_bins)
        return {
            "features": slide.features[place],
            "grid": grid,
            "distance": geometry.distance,
            "polar": geometry.polar,
            "anchors": geometry.anchors,
            "anchor_mask": geometry.anchor_mask,
            "noise": torch.rand(len(place), generator=generator),
            "anchor_noise": torch.rand(len(geometry.anchors), generator=generator),
        }

    @staticmethod
    def collate(views: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """B views as a batch: each entry padded with 0 at its end, and mask (B, N) bool, False at padding."""
        batch = {name: pad_stack([view[name] for view in views]) for name in views[0]}
        mask = pad_stack([torch.ones(len(view["features"]), dtype=torch.bool) for view in views])
        return {**batch, "mask": mask}
