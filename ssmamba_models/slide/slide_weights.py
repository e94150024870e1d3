"""Slide encoders on the disk and on the Hub: a folder with config.json and model.safetensors.

Layout of config.json: `kind` ("slide_encoder"), `architecture` (the name in the registry), `arguments` (what it was
made with, feature_dim included), `embed_dim`, `metadata` (what who saved it wanted to tell), and `domain` with the
SHA-256 of the weights, as tile encoders have it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ssmamba_models._version import __version__
from ssmamba_models.models.published import (
    CONFIG,
    DOMAIN,
    WEIGHTS,
    WeightsError,
    check_folder,
    check_hub,
    file_sha256,
    hub_file,
)
from ssmamba_models.output import set_usual_mode, whole_file
from ssmamba_models.slide.slide_encoder import SlideEncoder

_KIND = "slide_encoder"
_HUB = "hf-hub:"

Place = str | os.PathLike


def save_slide_encoder(
    encoder: SlideEncoder, folder: str | os.PathLike, metadata: Mapping[str, Any] | None = None
) -> str:
    """Write a slide encoder into a folder; other files there stay, an encoder there is replaced.

    Both files are written beside their places, and renamed one right after the other: until then the old encoder is
    untouched. config.json, which comes last, tells the SHA-256 of the weights: what a process that is killed between
    the two renames leaves of two encoders is refused by `load_slide_encoder`, never mixed up.

    Args:
        encoder: made by `create_slide_encoder`.
        folder: made where it is missing.
        metadata: what else config.json shall tell: str, numbers, lists and dicts of them.

    Returns:
        The SHA-256 of the weights.

    Raises:
        ValueError: the encoder was not made by `create_slide_encoder`, or metadata or arguments are no JSON.
        OSError: it cannot be written.
    """
    if not encoder.name:
        raise ValueError(f"{type(encoder).__name__} has no name in the registry; make it with create_slide_encoder")
    config = {
        "kind": _KIND,
        "architecture": encoder.name,
        "arguments": encoder.arguments,
        "embed_dim": encoder.embed_dim,
        "metadata": dict(metadata or {}),
    }
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments or metadata of {encoder.name!r} cannot be stored as JSON ({error})") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    with whole_file(folder / CONFIG, True) as config_part, whole_file(folder / WEIGHTS, True) as part:
        # One entry: safetensors writes several in any order, and the same encoder should give the same bytes.
        # Not save_file: it writes beside `part` under a name of its own, which nobody clears away if it is killed.
        part.write_bytes(save(tensors, {"format": "pt"}))
        set_usual_mode(part)
        sha256 = file_sha256(part)
        config[DOMAIN] = {"sha256": sha256, "embed_dim": encoder.embed_dim, "ssmamba_models_version": __version__}
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sha256


def load_slide_encoder(place: Place) -> SlideEncoder:
    """Read a slide encoder back.

    Args:
        place: a folder that `save_slide_encoder` wrote, or "hf-hub:ORG/NAME[@REVISION]".

    Returns:
        The encoder on the CPU, in eval mode.

    Raises:
        ValueError: what is there is no slide encoder, or its weights do not fit.
        OSError: it is not there, cannot be fetched, or is damaged.
    """
    from ssmamba_models.slide.slide_encoders import create_slide_encoder

    config = read_slide_config(place)
    feature_dim = config["arguments"].get("feature_dim")
    try:
        return create_slide_encoder(config["architecture"], feature_dim, pretrained=place).eval()
    # Arguments that somebody changed fail wherever the encoder first uses them.
    except Exception as error:
        if isinstance(error, (OSError, ImportError)) or os.fspath(place) in str(error):
            raise
        raise ValueError(f"no slide encoder can be made as {CONFIG} in {os.fspath(place)!r} says ({error})") from error


def read_slide_config(place: Place) -> dict[str, Any]:
    """What config.json of a saved slide encoder says (see the module), its weights compared with their SHA-256.

    Raises:
        ValueError, OSError: as `load_slide_encoder`.
    """
    config_file, _ = _files(place)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("kind") != _KIND:
        raise ValueError(
            f"{os.fspath(place)!r} holds no slide encoder, but {config['architecture']!r}; expected what "
            "`ssmamba slide-pretrain` writes (tile encoders are loaded by timm.create_model)"
        )
    arguments = config.get("arguments")
    if not isinstance(arguments, dict) or type(arguments.get("feature_dim")) is not int:
        raise ValueError(f"{str(config_file)!r} does not say which features its encoder takes; copy it again")
    if not isinstance(config["architecture"], str):
        raise ValueError(f"{str(config_file)!r} does not name its encoder; copy it again")
    if not isinstance(config.setdefault("metadata", {}), dict):
        raise ValueError(f'the "metadata" in {str(config_file)!r} are no mapping; copy it again')
    return config


def saved_arguments(place: Place, name: str, feature_dim: int) -> dict[str, Any]:
    """The arguments, feature_dim apart, of the encoder that is saved in a place, which must be of this name and width.

    Raises:
        ValueError: it is another; otherwise as `load_slide_encoder`.
    """
    config = read_slide_config(place)
    arguments = dict(config["arguments"])
    found = arguments.pop("feature_dim", None)
    if config["architecture"] != name:
        raise ValueError(f"{os.fspath(place)!r} holds {config['architecture']!r}, not {name!r}; ask for that")
    if found != feature_dim:
        raise ValueError(
            f"{os.fspath(place)!r} takes tile features of length {found}, and feature_dim is {feature_dim}; use "
            "features of the tile encoder that it was trained with"
        )
    return arguments


def load_weights(encoder: SlideEncoder, place: Place) -> None:
    """Load the weights that are saved in a place into an encoder.

    Raises:
        ValueError: a tensor is missing, too many, or of another shape; otherwise as `load_slide_encoder`.
    """
    _, weights = _files(place)
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{str(weights)!r} is damaged, or no safetensors file ({error}); save it again") from error
    cure = "give the arguments that it was trained with"
    check_fit(encoder.state_dict(), state, f"the weights in {os.fspath(place)!r}", encoder.name, cure)
    encoder.load_state_dict(state)


def check_fit(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], what: str, name: str, cure: str
) -> None:
    """Make sure that a state dict has the names and shapes that an encoder wants.

    Args:
        wanted, found: the state dicts.
        what, name, cure: for the message: what was found, the name of the encoder, and what to do.

    Raises:
        ValueError: a tensor is missing, too many, or of another shape.
    """
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is unknown" for key in found if key not in wanted]
    problems += [
        f"{key} has shape {tuple(found[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{what} do not fit {name!r}: {'; '.join(problems[:3])}{more}; {cure}")


def _files(place: Place) -> tuple[Path, Path]:
    """config.json and model.safetensors of a place, fetched where they must be, and compared."""
    name = os.fspath(place)
    if name.startswith(_HUB):
        repository = name.removeprefix(_HUB)
        check_hub(repository)
        return hub_file(repository, CONFIG), hub_file(repository, WEIGHTS)
    if not (Path(place) / CONFIG).is_file():
        state = "holds no" if Path(place).is_dir() else "is no folder with a"
        raise WeightsError(f"{name!r} {state} {CONFIG}; expected a run of `ssmamba slide-pretrain`, or a published one")
    check_folder(place, weights=True)
    return Path(place) / CONFIG, Path(place) / WEIGHTS
