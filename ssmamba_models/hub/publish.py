"""`ssmamba publish` in Python: the weights of a run or file, with card and configuration, to a folder or to the Hub."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssmamba_models.choices import WEIGHT_DTYPES
from ssmamba_models.hub.bundle import FILES, load_trained, write_bundle
from ssmamba_models.hub.card_page import CardInfo
from ssmamba_models.hub.slide_bundle import holds_slide_encoder, write_slide_bundle
from ssmamba_models.hub.upload import check_repo_id, upload

# (folder, repo_id, info, dtype) -> the SHA-256 of the weights, and the Python that loads them, with {name}.
Writer = Callable[[Path, str, CardInfo, str], tuple[str, str]]


@dataclass(frozen=True)
class Published:
    """What `publish` did.

    Attributes:
        place: the address of the commit, or the folder of a dry run.
        name: what timm.create_model takes, "hf-hub:..." or "local-dir:..."; of a slide encoder what
            create_slide_encoder takes as `pretrained`, "hf-hub:..." or the folder.
        files: what was written there.
        sha256: of model.safetensors.
        call: the Python that loads it.
    """

    place: str
    name: str
    files: tuple[str, ...]
    sha256: str
    call: str


def publish(
    source: str | os.PathLike,
    repo_id: str,
    model: str | None = None,
    *,
    info: CardInfo | None = None,
    dtype: str = "float32",
    dry_run: str | os.PathLike | None = None,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> Published:
    """Publish weights as timm (or `create_slide_encoder`) loads them: model.safetensors, config.json and a model card,
    in one commit.

    Args:
        source: the folder of a run, of tiles or slides, or a weight file.
        repo_id: ORG/NAME on the Hub.
        model: the timm name; None takes what the weights say. Slide encoders know theirs.
        info: what the card shall say that the run does not know.
        dtype: "float32", or "bfloat16" to store the weights in half the size, good to about 2 digits.
        dry_run: write a folder, new or empty, and upload nothing.
        private, token, revision: as `ssmamba_models.hub.upload.upload`.

    Returns:
        What was written, and where.

    Raises:
        ValueError: a bad repository name or dtype, or weights that cannot be read or do not fit the model.
        FileNotFoundError: the weights are not there.
        FileExistsError: the folder of the dry run holds something.
        OSError: the folder cannot be written, or the Hub cannot be reached or does not allow it.
    """
    check_repo_id(repo_id)
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(WEIGHT_DTYPES)}")
    folder = None if dry_run is None else _check_folder(dry_run)
    slide = holds_slide_encoder(source)
    if slide and model is not None:
        raise ValueError(f"{os.fspath(source)!r} holds a slide encoder, which says what it is; leave --model out")
    write = _slide_writer(source) if slide else _tile_writer(source, model)
    if folder is not None:
        name = str(folder) if slide else f"local-dir:{folder}"
        sha256, call = _to_folder(write, repo_id, info or CardInfo(), dtype, folder)
        return Published(str(folder), name, FILES, sha256, call.format(name=name))
    with tempfile.TemporaryDirectory(prefix="ssmamba-publish-") as temporary:
        folder = Path(temporary)
        sha256, call = write(folder, repo_id, info or CardInfo(), dtype)
        address = upload(folder, FILES, repo_id, private=private, token=token, revision=revision)
    name = f"hf-hub:{repo_id}@{revision}" if revision else f"hf-hub:{repo_id}"
    return Published(address, name, FILES, sha256, call.format(name=name))


def _slide_writer(source: str | os.PathLike) -> Writer:
    return lambda folder, *options: write_slide_bundle(folder, source, *options)


def _tile_writer(source: str | os.PathLike, model: str | None) -> Writer:
    trained = load_trained(source, model)
    call = 'timm.create_model("{name}", pretrained=True)'
    return lambda folder, *options: (write_bundle(folder, trained, *options), call)


def _to_folder(write: Writer, repo_id: str, info: CardInfo, dtype: str, folder: Path) -> tuple[str, str]:
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        written = write(part, repo_id, info, dtype)
        if folder.exists():
            folder.rmdir()  # empty, as was checked: Windows renames onto nothing
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return written


def _check_folder(dry_run: str | os.PathLike) -> Path:
    if not os.fspath(dry_run):
        raise ValueError("the folder of --dry-run is empty; name the folder to write")
    folder = Path(dry_run).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--dry-run {str(folder)!r} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"the folder {str(folder)!r} is not empty; name a new one for --dry-run")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(folder.parent)!r} does not exist; create it (mkdir -p)")
    return folder
