"""A masked autoencoder over a ViT of timm: what MAMIM's training step is measured against."""

from __future__ import annotations

import timm
import torch
from einops import rearrange
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

_HEAD_DIM = 32  # of the decoder: 16 heads at 512, as in the paper


class MaskedAutoencoder(nn.Module):
    """MAE: encode a quarter of the patches, decode them all, compare the hidden ones with their normalised pixels.

    Args:
        name: a plain ViT of timm, such as "vit_small_patch16_224".
        img_size: S, side of the input in pixels.
        mask_ratio: share of the patches that the encoder does not see.
        decoder_dim, decoder_depth: width and number of the decoder's blocks.

    forward: (B, 3, S, S), normalised -> the loss, a scalar.

    Raises:
        ValueError: the model is no plain ViT, or cannot take the size.

    Source: MAE (arXiv:2111.06377), sections 3 and 4.1.
    """

    def __init__(
        self,
        name: str,
        img_size: int = 224,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
    ) -> None:
        super().__init__()
        self.encoder = _create_vit(name, img_size)
        self.prefix, patches = self.encoder.num_prefix_tokens, self.encoder.patch_embed.num_patches
        self.patch_size = self.encoder.patch_embed.patch_size[0]
        self.kept = max(1, round((1 - mask_ratio) * patches))
        self.enter = nn.Linear(self.encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.position = nn.Parameter(torch.zeros(1, self.prefix + patches, decoder_dim))
        self.blocks = nn.Sequential(
            *(Block(decoder_dim, max(1, decoder_dim // _HEAD_DIM), qkv_bias=True) for _ in range(decoder_depth))
        )
        self.norm = nn.LayerNorm(decoder_dim)
        self.to_pixels = nn.Linear(decoder_dim, 3 * self.patch_size**2)
        for parameter in (self.mask_token, self.position):
            trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder.patch_embed(images)
        batch, patches = tokens.shape[:2]
        order = torch.rand(batch, patches, device=images.device).argsort(dim=1)
        encoded = self.enter(self._encode(tokens, order[:, : self.kept]))
        predicted = self._decode(encoded, order)[:, self.prefix :]
        error = (predicted.float() - self._target(images)).square().mean(-1)
        return error.gather(1, order[:, self.kept :]).mean()

    def _encode(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """The prefix tokens and the visible patches, (B, prefix + kept, C)."""
        position = self.encoder.pos_embed
        x = _gather(tokens + position[:, self.prefix :], visible)
        if self.prefix:
            start = self.encoder.cls_token + position[:, : self.prefix]
            x = torch.cat([start.expand(len(x), -1, -1), x], dim=1)
        return self.encoder.norm(self.encoder.blocks(self.encoder.norm_pre(x)))

    def _decode(self, encoded: Tensor, order: Tensor) -> Tensor:
        hidden = self.mask_token.to(encoded.dtype).expand(len(encoded), order.shape[1] - self.kept, -1)
        patches = _gather(torch.cat([encoded[:, self.prefix :], hidden], dim=1), order.argsort(dim=1))
        x = torch.cat([encoded[:, : self.prefix], patches], dim=1) + self.position
        return self.to_pixels(self.norm(self.blocks(x)))

    def _target(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, P * P * 3): the pixels of each patch, of mean 0 and variance 1."""
        p = self.patch_size
        x = rearrange(images.float(), "b c (h i) (w j) -> b (h w) (i j c)", i=p, j=p)
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def _create_vit(name: str, img_size: int) -> VisionTransformer:
    advice = "masked autoencoding is measured on a plain ViT, such as vit_small_patch16_224"
    try:
        model = timm.create_model(name, num_classes=0, img_size=img_size, dynamic_img_size=False)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"{name} cannot be made for {img_size} px ({error}); {advice}") from error
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        raise ValueError(f"{name} is no plain ViT of timm; {advice}")
    if (
        model.num_prefix_tokens != model.pos_embed.shape[1] - model.patch_embed.num_patches
        or model.reg_token is not None
    ):
        raise ValueError(f"{name} has register tokens, or tokens without a position; {advice}")
    if img_size % model.patch_embed.patch_size[0]:
        raise ValueError(f"{img_size} px is no multiple of the patch of {name}, {model.patch_embed.patch_size[0]} px")
    return model


def _gather(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
