"""The published checkpoints of PAMA, made encoders of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmamba_models.notice import first_line
from ssmamba_models.slide.pama import PAMA
from ssmamba_models.slide.slide_encoders import create_slide_encoder
from ssmamba_models.slide.slide_weights import check_fit

_WRAPPERS = ("state_dict", "model")
_RENAMED = (
    ("anchor_token", "kernel_token"),
    (".attn.distance_embed.", ".attn.dis_embed."),
    (".attn.polar_embed.", ".attn.polar_emb."),
)
# What pre-training and fine-tuning have besides the encoder.
_OTHERS = ("decoder_", "mask_token", "head.")


def load_pama_checkpoint(path: str | os.PathLike, **kwargs: Any) -> PAMA:
    """Read a checkpoint that the authors' code wrote (github.com/WkEEn/PAMA), as an encoder with `compat=True`.

    Accepted is a file of `torch.save` with a dict of tensors, or one that holds it under "state_dict" or "model", the
    names with or without a leading "module.", E the width, H the heads, R the sectors:

    - patch_embed.weight (E, D), patch_embed.bias; cls_token (1, 1, E); kernel_token (1, 1, E); norm.weight, norm.bias
    - of each block blocks.<i>: norm1, norm2 (.weight, .bias); attn.qkv.weight (3 E, E), attn.qkv.bias; attn.proj
      (.weight, .bias); attn.dis_embed.weight (66, H); attn.polar_emb.weight (R, 1), or (R, H); mlp.fc1, mlp.fc2
      (.weight, .bias)
    - passed over: decoder_* and mask_token of the pre-training, head.* of a fine-tuning

    Width of the features, depth, heads and the rest are read from the shapes. No code in the file is run.

    Args:
        path: the file (.pth, .pth.tar).
        **kwargs: arguments that no shape tells, such as tiles_per_anchor (published: 18 or 144), max_anchors or
            max_tiles.

    Returns:
        The encoder on the CPU, in eval mode; it can be saved like any other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such checkpoint: unreadable, or a tensor is missing, unknown, or of a wrong shape.

    Example:
        >>> encoder = load_pama_checkpoint("multi_organ_pretrain.pth.tar", tiles_per_anchor=18)
        >>> encoder.embed(features, grid)  # features (N, encoder.feature_dim)
    """
    name = repr(os.fspath(path))
    state = _encoder_of(_read(Path(path), name))
    arguments = _arguments(state, name)
    known = [key for key in kwargs if key in arguments]
    if known:
        raise ValueError(f"{known[0]} is read from {name}, where it is {arguments[known[0]]}; do not give it")
    encoder = create_slide_encoder("pama_base", **arguments, **kwargs)
    assert isinstance(encoder, PAMA)
    ours = encoder.state_dict()
    wanted = {_published(key): value for key, value in ours.items()}
    check_fit(wanted, state, f"the weights in {name}", "pama", "is it one of the authors' code?")
    encoder.load_state_dict({key: state[_published(key)] for key in ours})
    return encoder.eval()


def _read(path: Path, name: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint {name} does not exist")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # Broken files make torch raise what its parts raise: IndexError, OSError, BadZipFile and others.
    except Exception as error:
        if getattr(error, "filename", None) is not None:
            raise
        line = first_line(error)
        raise ValueError(
            f"the checkpoint {name} cannot be read ({line}): it is damaged, no file of torch.save, or holds more than "
            "tensors and plain containers"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(map(torch.is_tensor, found.values())):
        raise ValueError(f'the checkpoint {name} holds no state dict (names -> tensors), also not under "state_dict"')
    return found


def _encoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in plain.items() if not key.startswith(_OTHERS)}


def _published(key: str) -> str:
    """The published name of a parameter of ours."""
    for ours, theirs in _RENAMED:
        key = key.replace(ours, theirs)
    return key


def _arguments(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """What `create_slide_encoder` needs, from the shapes."""

    def shape(key: str) -> torch.Size:
        if key not in state or state[key].dim() != 2:
            found = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
            raise ValueError(f"the checkpoint {name} is none of PAMA: {key} {found}, expected a matrix")
        return state[key].shape

    embed_dim, feature_dim = shape("patch_embed.weight")
    polar_bins, tables = shape("blocks.0.attn.polar_emb.weight")
    num_heads = shape("blocks.0.attn.dis_embed.weight")[1]
    if tables not in (1, num_heads):
        raise ValueError(f"the checkpoint {name} has {tables} tables of sectors, expected 1 or {num_heads}, one a head")
    return {
        "feature_dim": feature_dim,
        "embed_dim": embed_dim,
        "depth": len({match[1] for match in (re.match(r"blocks\.(\d+)\.", key) for key in state) if match}),
        "num_heads": num_heads,
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight")[0] / embed_dim,
        "polar_bins": polar_bins,
        "shared_polar": tables == 1,
        "compat": True,
    }
