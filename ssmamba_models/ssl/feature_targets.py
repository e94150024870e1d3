"""What a teacher sees of a tile, as targets that a student predicts for masked patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmamba_models.layers.gather_rows import gather_rows, is_distributed


def feature_targets(fine: Tensor, coarse: Tensor) -> Tensor:
    """The last two maps of a teacher at the finer one's positions, every channel standardised over the batch.

    Standardised over all images (of all processes) and positions a constant prediction costs 1, and channels count
    alike: a teacher whose features lie close together still sets a task.

    Args:
        fine: (B, h, w, C).
        coarse: (B, ceil(h / 2), ceil(w / 2), C').

    Returns:
        (B, h, w, C + C') float32, without gradient.

    Source: targets from a moving average of the student that sees the whole image: data2vec (arXiv:2202.03555, sec. 3).
    """
    fine, coarse = fine.detach().float(), coarse.detach().float()
    return torch.cat([_standardised(fine), enlarge(_standardised(coarse), fine.shape[1:3])], dim=-1)


def feature_error(predicted: Tensor, target: Tensor, split: int, weight: Tensor) -> Tensor:
    """Mean over images of the weighted mean over positions of the squared error; either map makes a half of it.

    Args:
        predicted, target: (B, h, w, C + C').
        split: C, channels of the first map.
        weight: (B, h, w), 0 or more; an image of weight 0 has an error of 0.

    Returns:
        A scalar.
    """
    square = (predicted.float() - target).square()
    error = (square[..., :split].mean(-1) + square[..., split:].mean(-1)) / 2
    return ((error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1e-6)).mean()


def resample(values: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
    """What a map of one view shows at the positions of another view.

    Args:
        values: (B, h, w, C), a map of the one view.
        theta: (B, 2, 3): maps points of the other view to the one, in `affine_grid`'s coordinates.
        size: positions (h', w') of the other view.

    Returns:
        (B, h', w', C) float32, interpolated linearly.
    """
    grid = F.affine_grid(theta.float(), [len(values), values.shape[-1], *size], align_corners=False)
    # Half a position of the other view may lie beyond the outermost centres.
    moved = F.grid_sample(values.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    return moved.permute(0, 2, 3, 1)


def enlarge(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, h, w, C) at the nearest positions of a grid of another size (h', w')."""
    return F.interpolate(values.permute(0, 3, 1, 2), size=tuple(size), mode="nearest").permute(0, 2, 3, 1)


def _standardised(values: Tensor) -> Tensor:
    mean = _mean_of_all(values)
    return (values - mean) / (_mean_of_all((values - mean).square()).sqrt() + 1e-5)


def _mean_of_all(values: Tensor) -> Tensor:
    """(B, h, w, C) -> (C,): the mean over images and positions of all processes."""
    mean = values.mean((0, 1, 2))
    return gather_rows(mean[None]).mean(0) if is_distributed() else mean
