"""All slide encoders by name: `create_slide_encoder`, `list_slide_encoders`."""

from __future__ import annotations

import difflib
import importlib
import os
from typing import Any

from ssmamba_models.slide.class_arguments import check_arguments
from ssmamba_models.slide.slide_encoder import SlideEncoder

# Name -> (module under ssmamba_models.slide, class, arguments that make it of the class).
_ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gigassl_scm": ("gigassl", "GigaSSLSparse", {}),
    "gigassl_mlp": ("gigassl", "GigaSSLMlp", {}),
    "pama_base": ("pama", "PAMA", {"embed_dim": 1024, "depth": 4, "num_heads": 8}),
    "pama_small": ("pama", "PAMA", {"embed_dim": 512, "depth": 4, "num_heads": 8}),
    "test_gigassl": ("gigassl", "GigaSSLSparse", {"embed_dim": 16}),
    "test_pama": ("pama", "PAMA", {"embed_dim": 16, "depth": 2, "num_heads": 2, "tiles_per_anchor": 8}),
}


def list_slide_encoders() -> list[str]:
    """The names that `create_slide_encoder` knows; those that begin with test_ are tiny, and for tests."""
    return list(_ENCODERS)


def create_slide_encoder(
    name: str, feature_dim: int, pretrained: bool | str | os.PathLike = False, **kwargs: Any
) -> SlideEncoder:
    """Make a slide encoder: a module that maps the tile features of slides to one vector each.

    Args:
        name: one of `list_slide_encoders()`.
        feature_dim: D, the length of a tile's feature.
        pretrained: False has random weights; a folder, or "hf-hub:ORG/NAME[@REVISION]", loads those that are saved
            there (see `slide_weights.save_slide_encoder`), made with the arguments that are saved beside them.
        **kwargs: further arguments of its class; they go before those that are saved.

    Returns:
        The module; see `SlideEncoder` for its inputs and outputs. `.name` and `.arguments` say what it was made from.

    Raises:
        ValueError: an unknown name or argument, a value that cannot be, or weights that are not there or do not fit.
        OSError: the weights cannot be read, fetched, or are damaged.

    Example:
        >>> encoder = create_slide_encoder("gigassl_scm", feature_dim=512)
        >>> encoder(features, grid)  # features (B, N, 512), grid (B, N, 2) -> (B, 512)
        >>> encoder.embed(features[0], grid[0], seed=0)  # one whole slide -> (512,)
    """
    _check_name(name)
    if pretrained is True:
        raise ValueError(
            f"no weights of {name!r} are published; train it on your slides with `ssmamba slide-pretrain`, then give "
            'its folder, pretrained="FOLDER" (or pretrained="hf-hub:ORG/NAME")'
        )
    if pretrained:
        from ssmamba_models.slide.slide_weights import load_weights, saved_arguments

        kwargs = {**saved_arguments(pretrained, name, feature_dim), **kwargs}
    encoder = _make(name, feature_dim, kwargs)
    if pretrained:
        load_weights(encoder, pretrained)
    return encoder


def _check_name(name: str) -> None:
    if name not in _ENCODERS:
        near = difflib.get_close_matches(str(name).lower(), _ENCODERS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(_ENCODERS)}"
        raise ValueError(f"unknown slide encoder {name!r}; {hint}")


def _make(name: str, feature_dim: int, kwargs: dict[str, Any]) -> SlideEncoder:
    module, attribute, defaults = _ENCODERS[name]
    cls = getattr(importlib.import_module(f"ssmamba_models.slide.{module}"), attribute)
    check_arguments(f"slide encoder {name!r}", cls, kwargs, ("feature_dim",))
    encoder = cls(feature_dim, **{**defaults, **kwargs})
    # Where it is, and in which precision, is no matter of what it is.
    kept = {key: value for key, value in kwargs.items() if key not in ("device", "dtype")}
    encoder.name, encoder.arguments = name, {"feature_dim": feature_dim, **kept}
    return encoder
