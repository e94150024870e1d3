"""TransMIL by torchmil, with the class token's attention alone: torchmil gives that of all tiles to all tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmamba_models.slide.aggregator import Output
from ssmamba_models.slide.torchmil_models import TorchmilAggregator, check_heads, require_torchmil


class TransMIL(TorchmilAggregator):
    """Nyström transformer layers over the tiles, with convolutions over the square that they are laid out in.

    Time and memory grow with the number of tiles. The "attention" is that of the class token in the last layer, the
    mean over heads; Nyström's approximation can make it negative, which counts as 0.

    Args:
        feature_dim, num_classes, hidden_dim, dropout: as for `ABMIL`.
        depth: number of layers, 2 or more.
        heads: heads of each; they divide hidden_dim.
        landmarks: Nyström landmarks; default hidden_dim / 2.

    Source: Shao et al. (arXiv:2106.00908), by torchmil.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 512,
        depth: int = 2,
        heads: int = 8,
        landmarks: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(feature_dim, num_classes, hidden_dim, dropout)
        if depth < 2:
            raise ValueError(f"aggregator 'transmil': depth is {depth}, expected 2 or more")
        check_heads("transmil", hidden_dim, heads)
        self.model = require_torchmil().TransMIL(
            (hidden_dim,), att_dim=hidden_dim, n_layers=depth, n_heads=heads, n_landmarks=landmarks
        )
        self.model.classifier = nn.Linear(hidden_dim, num_classes)

    def pool_bag(self, features: Tensor, coords: Tensor | None) -> Output:
        attention = self.model.layers[-1].att_module
        seen = []
        hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        try:
            logits = self.model(self.embed(features)[None])
        finally:
            hook.remove()
        weights = class_token_attention(attention, seen[0])[0, 1 : len(features) + 1].float().clamp(min=0)
        # All of them 0 would be no division of the attention at all.
        weights = weights + torch.finfo(weights.dtype).tiny
        return {"logits": logits, "attention": weights / weights.sum()}


@torch.no_grad()
def class_token_attention(module: nn.Module, x: Tensor) -> Tensor:
    """The first token's row of a Nyström attention, in memory that grows with the tokens and not with their square.

    Args:
        module: torchmil's `NystromAttention`.
        x: (1, L, C), its input.

    Returns:
        (1, L), the mean over heads.

    Source: Xiong et al. (arXiv:2102.03902), equation 14, one row of it.
    """
    from torchmil.nn.attention.nystrom_attention import moore_penrose_iter_pinv

    length, landmarks = x.shape[1], module.n_landmarks
    padding = -length % landmarks
    x = F.pad(x, (0, 0, padding, 0))
    q, k = (part.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for part in module._qkv(x)[:2])
    q = q * module.scale_factor
    q_landmarks, k_landmarks = (part.unflatten(2, (landmarks, -1)).mean(dim=3) for part in (q, k))
    first = (q[:, :, padding : padding + 1] @ k_landmarks.transpose(-1, -2)).softmax(dim=-1)
    middle = (q_landmarks @ k_landmarks.transpose(-1, -2)).softmax(dim=-1)
    row = first @ moore_penrose_iter_pinv(middle, module.pinv_iterations)
    last = (q_landmarks @ k.transpose(-1, -2)).softmax(dim=-1)
    return (row @ last)[:, :, 0, padding:].mean(dim=1)
