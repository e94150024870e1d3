"""`ssmamba publish` in Python: the weights of a run or file, with card and configuration, to a folder or to the Hub."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ssmamba_models.hub.bundle import FILES, load_trained, write_bundle
from ssmamba_models.hub.card import CardInfo
from ssmamba_models.hub.upload import check_repo_id, upload


@dataclass(frozen=True)
class Published:
    """What `publish` did.

    Attributes:
        place: the address of the commit, or the folder of a dry run.
        name: what timm.create_model takes: "hf-hub:..." or "local-dir:...".
        files: what was written there.
        sha256: of model.safetensors.
    """

    place: str
    name: str
    files: tuple[str, ...]
    sha256: str


def publish(
    source: str | os.PathLike,
    repo_id: str,
    model: str | None = None,
    *,
    info: CardInfo | None = None,
    bf16: bool = False,
    dry_run: str | os.PathLike | None = None,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> Published:
    """Publish weights as timm loads them: model.safetensors, config.json and a model card, in one commit.

    Args:
        source: the folder of a run, or a weight file.
        repo_id: ORG/NAME on the Hub.
        model: the timm name; None takes what the weights say.
        info: what the card shall say that the run does not know.
        bf16: store the weights in bfloat16: half the size, good to about 2 digits.
        dry_run: write a folder, new or empty, and upload nothing.
        private, token, revision: as `ssmamba_models.hub.upload.upload`.

    Returns:
        What was written, and where.

    Raises:
        ValueError: a bad repository name, or weights that cannot be read or do not fit the model.
        FileNotFoundError: the weights are not there.
        FileExistsError: the folder of the dry run holds something.
        OSError: the folder cannot be written, or the Hub cannot be reached or does not allow it.
    """
    check_repo_id(repo_id)
    if dry_run is not None:
        return _to_folder(source, repo_id, model, info or CardInfo(), bf16, dry_run)
    with tempfile.TemporaryDirectory(prefix="ssmamba-publish-") as temporary:
        folder = Path(temporary)
        sha256 = write_bundle(folder, load_trained(source, model), repo_id, info or CardInfo(), bf16)
        address = upload(folder, FILES, repo_id, private=private, token=token, revision=revision)
    name = f"hf-hub:{repo_id}@{revision}" if revision else f"hf-hub:{repo_id}"
    return Published(address, name, FILES, sha256)


def _to_folder(source, repo_id: str, model: str | None, info: CardInfo, bf16: bool, dry_run) -> Published:
    folder = _check_folder(dry_run)
    trained = load_trained(source, model)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        sha256 = write_bundle(part, trained, repo_id, info, bf16)
        if folder.exists():
            folder.rmdir()  # empty, as was checked: Windows renames onto nothing
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Published(str(folder), f"local-dir:{folder}", FILES, sha256)


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
