"""Published weights: fetched with errors that name the cure, and checked to be what their publisher uploaded.

`ssmamba publish` writes the SHA-256 of the weights into config.json. timm compares nothing, so the models of this
package compare it themselves, in every way that timm loads them: "hf-hub:", "local-dir:" and registry names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmamba_models.notice import first_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DOMAIN = "domain"  # our block in config.json, at its top level: timm refuses strangers further down


class WeightsError(OSError):
    """Published weights that are not there, cannot be fetched, or are not those that were published."""


def check_named(model_name: str, pretrained: bool, cache_dir: str | os.PathLike | None = None) -> None:
    """Fetch and check what a name with a source stands for, before timm does and says less.

    Args:
        model_name: "hf-hub:ORG/NAME[@REVISION]" or "local-dir:PATH".
        pretrained: whether the weights are wanted too, not the configuration alone.
        cache_dir: instead of the Hub's own cache.

    Raises:
        ValueError: the name has another source, or names no repository.
        WeightsError: see there.
    """
    source, _, place = model_name.partition(":")
    if source in ("hf-hub", "hf_hub"):
        hub_file(place, CONFIG, cache_dir)
        if pretrained:
            check_hub(place, cache_dir=cache_dir)
    elif source == "local-dir":
        check_folder(place, pretrained)
    else:
        raise ValueError(f"{model_name!r} has an unknown source; expected hf-hub:ORG/NAME or local-dir:FOLDER")


def offline_note() -> str:
    """What a message adds where the Hub was not asked at all: "" or "; HF_HUB_OFFLINE is set"."""
    from huggingface_hub import constants

    return "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""


def check_cfg(cfg: Mapping[str, Any], cache_dir: str | os.PathLike | None = None) -> None:
    """Fetch and check the weights of a timm pretrained configuration, where it says hub or folder.

    Raises:
        ValueError, WeightsError: as `check_named`.
    """
    source = cfg.get("source")
    if source == "local-dir":
        check_folder(cfg["file"], weights=True)
    elif source == "hf-hub" or (cfg.get("hf_hub_id") and not cfg.get("file") and not cfg.get("state_dict")):
        check_hub(cfg["hf_hub_id"], cfg.get("hf_hub_filename"), cache_dir)


def check_hub(repository: str, filename: str | None = None, cache_dir: str | os.PathLike | None = None) -> None:
    """Fetch a repository's weights into the cache, and compare them with its configuration.

    Args:
        repository: "ORG/NAME" or "ORG/NAME@REVISION".
        filename: of the weights; None means model.safetensors, or what timm finds where that is missing.

    Raises:
        ValueError, WeightsError: as `check_named`.
    """
    try:
        config = _read_config(hub_file(repository, CONFIG, cache_dir))
    except _MissingFile:
        config = {}  # weights alone: nothing to compare with
    try:
        weights = hub_file(repository, filename or WEIGHTS, cache_dir)
    except _MissingFile:
        if filename or _published_hash(config):
            raise
        return
    _compare(weights, _published_hash(config), f"hf-hub:{repository}")


def check_folder(folder: str | os.PathLike, weights: bool) -> None:
    """The same for a folder as `ssmamba publish --dry-run` writes it.

    Raises:
        WeightsError: it holds no configuration, or not the weights that this speaks of.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        state = "holds no" if folder.is_dir() else "is no folder with a"
        raise WeightsError(f"{str(folder)!r} {state} {CONFIG}; expected what `ssmamba publish --dry-run` writes")
    published = _published_hash(_read_config(folder / CONFIG))
    if not weights or not published:
        return
    if not (folder / WEIGHTS).is_file():
        raise WeightsError(f"{str(folder)!r} holds no {WEIGHTS}, which its {CONFIG} speaks of; copy it again")
    _compare(folder / WEIGHTS, published, f"local-dir:{folder}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{str(path)!r} is not JSON ({error}): it is damaged; fetch it again") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise WeightsError(f'{str(path)!r} describes no timm model (it has no "architecture")')
    return config


def _published_hash(config: Mapping[str, Any]) -> str | None:
    block = config.get(DOMAIN)
    return block.get("sha256") if isinstance(block, Mapping) else None


def _compare(path: Path, published: str | None, name: str) -> None:
    if published is None:
        return
    path = path.resolve()  # the cache links to its files; to delete a link is no cure
    status = path.stat()
    found = _hash(str(path), status.st_size, status.st_mtime_ns)
    if found != published:
        raise WeightsError(
            f"the weights of {name} are not those that were published: the SHA-256 of {str(path)!r} is {found}, and "
            f"{CONFIG} says {published}; delete that file and load again, or take another revision"
        )


@functools.lru_cache(maxsize=16)
def _hash(path: str, size: int, mtime: int) -> str:
    # Size and time are there for the cache: the same path may hold another file later.
    return file_sha256(path)


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class _MissingFile(WeightsError):
    """The repository is there, the file is not."""


def hub_file(repository: str, filename: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """A file of a repository, downloaded into the cache where it is not there yet.

    Args:
        repository: "ORG/NAME" or "ORG/NAME@REVISION", a branch, tag or commit.
        filename: in the repository.
        cache_dir: instead of the Hub's own cache.

    Returns:
        Its path in the cache.

    Raises:
        ValueError: `repository` is no name of one.
        WeightsError: it is not there, may not be read, cannot be reached, or the download broke off.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = repository.partition("@")
    if "@" in revision:
        raise ValueError(_no_name(repository))
    try:
        cache = None if cache_dir is None else os.fspath(cache_dir)
        return Path(hf_hub_download(name, filename, revision=revision or None, cache_dir=cache))
    except HFValidationError as error:
        raise ValueError(_no_name(repository)) from error
    # The hub's client raises its own errors, and those of requests or httpx, whichever it builds on.
    except Exception as error:
        raise _explain(error, name, revision, filename) from error


def _no_name(repository: str) -> str:
    return f"{repository!r} names no repository; expected ORG/NAME or ORG/NAME@REVISION"


def _explain(error: Exception, name: str, revision: str, filename: str) -> WeightsError:
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    at = f"{name!r} at revision {revision!r}" if revision else f"{name!r}"
    if isinstance(error, errors.GatedRepoError):
        return WeightsError(f"{name!r} is gated: ask for access on {where}/{name}, then log in (hf auth login)")
    status = getattr(getattr(error, "response", None), "status_code", None)
    # A hub tells a private repository from none only to who may see it; a bad token it does tell.
    hidden = status == 401 and "Invalid credentials" not in str(error)
    if isinstance(error, errors.RepositoryNotFoundError) or hidden:
        return WeightsError(
            f"there is no repository {name!r} on {where}, or it is private: check the name; "
            "for a private one log in (hf auth login) or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsError(f"{name!r} has no revision {revision!r}; see {where}/{name}/commits/main")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return WeightsError(_explain_unreachable(at, where, constants.HF_HUB_OFFLINE))
    if isinstance(error, errors.EntryNotFoundError):
        return _MissingFile(f"the repository {at} holds no {filename}")
    if status in (401, 403):
        return WeightsError(f"{where} refuses the token for {at}: log in again (hf auth login), or renew HF_TOKEN")
    reason = first_line(error)
    return WeightsError(f"the download of {filename} from {at} did not end ({reason}); try again")


def _explain_unreachable(at: str, where: str, offline: bool) -> str:
    if offline:
        return f"{at} is not in the cache, and HF_HUB_OFFLINE forbids to download it; unset that once, with a network"
    return (
        f"{at} is not in the cache, and {where} cannot be reached; check the network, the proxy and HF_ENDPOINT "
        "(`ssmamba doctor` shows the settings)"
    )
