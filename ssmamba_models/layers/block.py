"""The block of SSMamba: local perception, a directional scan and an MLP, one after the other."""

# No `from __future__ import annotations`: TorchScript, which may script a graph of torch.fx that holds a block, knows
# the class Tensor but not its name.
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp, register_notrace_module
from torch import Tensor, nn

from ssmamba_models.layers.dms import DMS
from ssmamba_models.layers.lpr import LPR
from ssmamba_models.layers.pieces import are_float32, is_inference, is_own, is_unwatched, piece_grain, piece_length
from ssmamba_models.ops.depthwise import depthwise3x3
from ssmamba_models.ops.products import Product, product


@register_notrace_module  # one node for torch.fx: how it works depends on the tensor
class Block(nn.Module):
    """LPR, then DMS and MLP, each normalised first and added to its input.

    In inference on a CPU large maps pass through all that treats each token alone in pieces (layers.pieces).

    Args:
        mlp_ratio: hidden width of the MLP over its width.
        drop: dropout in the MLP. drop_path: stochastic depth rate of both branches.
        scales, d_state, scan_init: see :class:`~ssmamba_models.layers.DMS`.

    Shape: (B, H, W, C) and a hold mask (B, H, W) or None -> (B, H, W, C). With `overwrite` the result may lie in the
    memory of the input, which the caller then gives up.
    """

    def __init__(
        self,
        dim: int,
        scales: tuple[int, ...],
        d_state: int = 1,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        scan_init: str = "silent",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lpr = LPR(dim, **dd)
        self.norm1 = LayerNorm(dim, **dd)
        self.dms = DMS(dim, scales, d_state, scan_init=scan_init, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.inner_width = int(dim * mlp_ratio)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, hold: Tensor | None = None, overwrite: bool = False) -> Tensor:
        if not torch.jit.is_scripting() and self.works_in_pieces(x):
            return self._forward_in_pieces(x, hold, overwrite)
        x = self.lpr(x)
        x = x + self.drop_path1(self.dms(self.norm1(x), hold))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    def works_in_pieces(self, x: Tensor) -> bool:
        """Whether this input is taken in pieces, over memory of the block's own, or of the input if it is given up."""
        if not is_inference(x):
            return False
        tokens = x[..., 0].numel()
        return piece_length(tokens, self.inner_width) < tokens and is_unwatched(self) and self._is_own()

    @torch.jit.ignore
    def _forward_in_pieces(self, x: Tensor, hold: Tensor | None, overwrite: bool) -> Tensor:
        plain = x.dtype == torch.float32 and are_float32((self.lpr, self.dms, self.mlp))
        if plain and overwrite and x.is_contiguous():
            x = _convolve(x, self.lpr.conv, residual=True)
        else:
            x = self.lpr(x)
        tokens = x.reshape(-1, x.shape[-1])
        length = piece_length(len(tokens), self.inner_width)
        projected = self._project(tokens, length, plain).view(x.shape)
        projected = _convolve(projected, self.dms.conv, silu=True) if plain else self.dms.convolve(projected)
        parts = self.dms.scan(projected, hold)
        del projected
        parts = [part.reshape(-1, part.shape[-1]).split(length) for part in parts]
        products = self._products(tokens) if plain else None
        for piece, *scanned in zip(tokens.split(length), *parts):
            normed = self.dms.norm(torch.cat(scanned, dim=-1))
            if products is not None:
                self._add_branches(piece, normed, *products)
            else:
                piece += self.dms.out_proj(normed)
                piece += self.mlp(self.norm2(piece))
        return tokens.view(x.shape)

    def _project(self, tokens: Tensor, length: int, plain: bool) -> Tensor:
        projected = tokens.new_empty(tokens.shape)  # contiguous, whatever the tokens are
        own = self._product(self.dms.in_proj, tokens) if plain else None
        for piece, result in zip(tokens.split(length), projected.split(length)):
            if own is not None:
                own.into(result, self.norm1(piece))
            else:
                result.copy_(self.dms.in_proj(self.norm1(piece)))
        return projected

    def _is_own(self) -> bool:
        """Whether the layers are those that __init__ made: others may want the whole map, or hand on the caller's."""
        dms, mlp = self.dms, self.mlp
        return (
            is_own(self.lpr, LPR)
            and is_own(dms, DMS)
            and is_own(mlp, Mlp)
            and all(is_own(layer, nn.Linear) for layer in (dms.in_proj, dms.out_proj, mlp.fc1, mlp.fc2))
            and all(_is_depthwise(conv) for conv in (self.lpr.conv, dms.conv))
            and is_own(dms.act, nn.SiLU)
            and all(layer.bias is None for layer in (dms.in_proj, dms.out_proj))
            and all(layer.bias is not None for layer in (mlp.fc1, mlp.fc2))
            and all(is_own(norm, LayerNorm) for norm in (self.norm1, dms.norm, self.norm2))
            and is_own(mlp.norm, nn.Identity)
            and is_own(mlp.act, nn.GELU)
            and mlp.act.approximate == "none"
            and all(is_own(path, nn.Identity) or is_own(path, DropPath) for path in (self.drop_path1, self.drop_path2))
        )

    def _products(self, tokens: Tensor) -> list[Product]:
        """Those after the scans: of DMS, and of the MLP its first, with GELU after it, and its second."""
        return [self._product(layer, tokens) for layer in (self.dms.out_proj, self.mlp.fc1, self.mlp.fc2)]

    def _product(self, layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Product:
        return product(layer.weight, layer.bias, tokens, piece_grain(self.inner_width))

    def _add_branches(self, tokens: Tensor, scanned: Tensor, out: Product, first: Product, second: Product) -> None:
        """Add both branches to `tokens`."""
        out.add_to(tokens, scanned)
        second.add_to(tokens, first.gelu(self.norm2(tokens)))


def _is_depthwise(conv: nn.Module) -> bool:
    """Whether this is the convolution of LPR and DMS, with no other geometry set."""
    if not is_own(conv, nn.Conv2d) or conv.bias is None or conv.padding_mode != "zeros":
        return False
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == conv.in_channels == conv.out_channels


def _convolve(x: Tensor, conv: nn.Conv2d, silu: bool = False, residual: bool = False) -> Tensor:
    assert conv.bias is not None  # as _is_depthwise has found
    return depthwise3x3(x, conv.weight, conv.bias, silu, residual)
