"""Weight files: found, read without running code, fitted to a model, and told apart by their hash."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict
from torch import nn

from ssmamba_models.models.checkpoints import WRAPPERS, checkpoint_filter_fn
from ssmamba_models.models.ssmamba import SSMamba
from ssmamba_models.notice import first_line

RUN_WEIGHTS = "weights.safetensors"  # a run's plain weights, in its folder


def find_weights(source: str | os.PathLike) -> Path:
    """The weight file that a user means.

    Args:
        source: a weight file, or the folder of a run of `ssmamba pretrain` or `ssmamba finetune`.

    Returns:
        The path of a file.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder holds no weights.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"the checkpoint {str(path)!r} does not exist; expected a weight file or a run folder")
    if not (path / RUN_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"the folder {str(path)!r} holds no {RUN_WEIGHTS}: it is no run folder, or its run has not "
            "reached its first checkpoint yet"
        )
    return path / RUN_WEIGHTS


def read_weights(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a weight file, without running any code that it may hold.

    Args:
        path: .safetensors; or .pth, .pt or .bin, which may hold tensors and plain containers alone
            (`torch.load(weights_only=True)`). The wrappings of usual trainers ("state_dict", "module.", ...)
            are taken off.

    Returns:
        The state dict, on the CPU, and the file's metadata: {} for all but .safetensors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is empty, truncated, holds code, or holds no state dict.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise ValueError(f"the checkpoint {str(path)!r} is empty: was its copy or download interrupted?")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    state, metadata = read(path)
    if not isinstance(state, Mapping) or not state or not all(torch.is_tensor(value) for value in state.values()):
        raise ValueError(f"the checkpoint {str(path)!r} holds no state dict (names -> tensors)")
    return dict(state), metadata


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"the checkpoint {str(path)!r} is not a safe weight file: truncated, damaged or no safetensors at all "
            f"({first_line(error)}); copy or download it again"
        ) from error


def _read_pickle(path: Path) -> tuple[object, dict[str, str]]:
    try:
        # timm's own training checkpoints carry their command line, a Namespace, which is data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # Broken files make torch raise what its parts raise: IndexError, OSError, BadZipFile and others.
    except Exception as error:
        # A file that may not be opened is named; one that is damaged makes torch seek before its beginning.
        if getattr(error, "filename", None) is not None:
            raise
        # torch's own message tells how to load it nevertheless: how to run what a stranger wrote.
        blocked = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors, which may be code, or is damaged" if blocked else first_line(error)
        raise ValueError(
            f"the checkpoint {str(path)!r} is not a safe weight file ({reason}); "
            "expected .safetensors, or a .pth that is whole and holds tensors alone"
        ) from error
    state = _unwrap(checkpoint)
    if isinstance(state, Mapping) and all(isinstance(name, str) for name in state):
        return clean_state_dict(dict(state)), {}
    return None, {}


def _unwrap(checkpoint: object) -> object:
    while isinstance(checkpoint, Mapping):
        inner = [checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)]
        if not inner:
            break
        checkpoint = inner[0]
    return checkpoint


def load_weights(model: nn.Module, source: str | os.PathLike, classifier: str = "drop") -> dict[str, str]:
    """Load a weight file into a model: every tensor of the encoder, or none.

    Args:
        model: a timm model; its dtype and device stay as they are.
        source: as `find_weights`.
        classifier: "drop" leaves the file's classifier, if any, and the model's own, if any, alone;
            "keep" loads it, so that both must have the same classes.

    Returns:
        The file's metadata.

    Raises:
        FileNotFoundError: as `find_weights`.
        ValueError: as `read_weights` and `fit_weights`, or `classifier` is neither.
    """
    path = find_weights(source)
    state, metadata = read_weights(path)
    fit_weights(model, state, metadata, path, classifier)
    return metadata


def fit_weights(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    path: str | os.PathLike,
    classifier: str = "drop",
) -> None:
    """Put what `read_weights` gave into a model; see `load_weights`.

    Args:
        path: what the messages call the weights.

    Raises:
        ValueError: the weights are of another architecture, another width or other classes; the message
            names what differs; or they are not finite. The model is then unchanged.
    """
    if classifier not in ("drop", "keep"):
        raise ValueError(f'classifier is {classifier!r}, expected "drop" or "keep"')
    state = _unprefixed(model, state)
    own = model.state_dict()
    if classifier == "drop":
        state = {name: value for name, value in state.items() if not _is_classifier(model, name)}
        own = {name: value for name, value in own.items() if not _is_classifier(model, name)}
    problems = _compare(own, state)
    said, made = _said_model(metadata), _architecture(model)
    if problems or (said and said != made):
        raise ValueError(_misfit(model, state, path, said, made, problems))
    # What is no parameter (a mask in a buffer) may be infinite.
    learned = (name for name, _ in model.named_parameters() if name in state)
    bad = next((name for name in learned if not torch.isfinite(state[name]).all()), None)
    if bad is not None:
        raise ValueError(
            f"the weights {str(path)!r} are not finite (first: {bad}): the training that made them diverged, or they "
            "are damaged; take an earlier checkpoint, or other weights"
        )
    model.load_state_dict(state, strict=False)


def classifier_width(model: nn.Module, state: Mapping[str, torch.Tensor]) -> int:
    """How many classes the classifier in a state dict tells apart; 0 where there is none.

    Args:
        model: a timm model of the same architecture.
        state: as `read_weights` gave it.
    """
    state = _unprefixed(model, state)
    found = [state[f"{layer}.weight"] for layer in _classifiers(model) if f"{layer}.weight" in state]
    return found[0].shape[0] if found else 0


def _unprefixed(model: nn.Module, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    # Ours may lie inside a self-supervised module ("encoder.") that a trainer has wrapped once more.
    return checkpoint_filter_fn(dict(state), model) if isinstance(model, SSMamba) else state


def _is_classifier(model: nn.Module, name: str) -> bool:
    # An encoder has no classifier, a checkpoint of a trained classifier does: features do not need it.
    return any(name.startswith(f"{layer}.") for layer in _classifiers(model))


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    layers = _cfg(model).get("classifier") or ()
    return (layers,) if isinstance(layers, str) else tuple(layers)


def _cfg(model: nn.Module) -> Mapping:
    return getattr(model, "pretrained_cfg", None) or {}


def _architecture(model: nn.Module) -> str:
    return _cfg(model).get("architecture") or type(model).__name__


def _said_model(metadata: Mapping[str, str]) -> str:
    # A name with a source ("hf-hub:...") says where a model came from, not what it is.
    name = metadata.get("model", "")
    return "" if ":" in name else name.split(".")[0]


def _compare(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing (first: {missing[0]})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
    if reshaped:
        name = reshaped[0]
        shapes = f"{tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        problems.append(f"{len(reshaped)} of another shape (first: {name}: {shapes})")
    return problems


def _misfit(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    path: str | os.PathLike,
    said: str,
    made: str,
    problems: list[str],
) -> str:
    width, own_width = _width(model, state), getattr(model, "num_features", None)
    origin = said or "another model"
    if width and own_width and width != own_width:
        origin, made = f"{origin} ({width} features)", f"{made} ({own_width})"
    cure = f"create {said}, or take other weights" if said else "create the model that they were made by"
    if os.path.basename(os.path.dirname(path)) == "checkpoints":
        cure = "a run's weights, without the rest of its training state, are loaded by the name of its folder"
    differing = f": tensors {', '.join(problems)}" if problems else ""
    return f"the weights {str(path)!r} are of {origin} and do not fit {made}{differing}; {cure}"


def _width(model: nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    # The last vector of num_features in a model is its final norm's: the same name tells the file's width.
    wanted = (getattr(model, "num_features", None),)
    for name, value in reversed(model.state_dict().items()):
        if tuple(value.shape) == wanted and name in state and state[name].ndim == 1:
            return state[name].shape[0]
    return None


def weights_sha256(model: nn.Module) -> str:
    """The SHA-256 of a model's weights: name, dtype, shape and bytes of each tensor, in the order of names.

    Args:
        model: any module; parameters and persistent buffers count, the device does not.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
