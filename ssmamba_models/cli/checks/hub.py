"""The Hugging Face hub: its settings, its cache, and whether a token is there (never the token itself)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ssmamba_models.cli.checks.finding import Finding

_SUBJECT = "hub"
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
# The largest pathology encoders weigh 4.5 GB.
_ROOM = 5 * 2**30


def check_hub() -> list[Finding]:
    """Look at the settings that decide whether and where weights are downloaded."""
    return [_home(), _offline(), _endpoint(), _cache(), _token()]


def _hub_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expandvars(os.environ.get("HF_HOME") or Path(base) / "huggingface")).expanduser()


def _cache_folder() -> Path:
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(named or _hub_home() / "hub")).expanduser()


def _home() -> Finding:
    origin = "from HF_HOME" if os.environ.get("HF_HOME") else "HF_HOME is not set"
    return Finding(_SUBJECT, "home", "ok", f"{_hub_home()} ({origin})")


def _offline() -> Finding:
    # As huggingface_hub reads them: the second only where the first is not set.
    variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    if os.environ.get(variable, "").upper() in _TRUE:
        text = f"{variable} is set: only packaged weights and those in the cache can be used"
        return Finding(_SUBJECT, "offline", "warning", text, f"unset {variable} to download others")
    return Finding(_SUBJECT, "offline", "ok", "no")


def _endpoint() -> Finding:
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not endpoint.startswith(("https://", "http://")):
        text = f"HF_ENDPOINT is {endpoint!r}, not a web address"
        return Finding(_SUBJECT, "endpoint", "problem", text, "export HF_ENDPOINT=https://... or unset it")
    return Finding(_SUBJECT, "endpoint", "ok", endpoint or "https://huggingface.co (HF_ENDPOINT is not set)")


def _cache() -> Finding:
    folder = _cache_folder()
    # os.path, as pathlib raises where a folder above must not be looked into.
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    cure = "export HF_HOME=FOLDER, a folder that you may write in"
    if not os.path.isdir(existing):
        return Finding(_SUBJECT, "cache", "problem", f"{folder}: {existing} is a file, not a folder", cure)
    if not os.access(existing, os.W_OK):
        return Finding(_SUBJECT, "cache", "problem", f"{folder}: {existing} is not writable", cure)
    free = shutil.disk_usage(existing).free
    state = "exists" if existing == folder else "will be made on the first download"
    text = f"{folder} ({state}), {free / 2**30:.1f} GiB free"
    if free < _ROOM:
        cure = "free some space, or export HF_HOME=FOLDER on a larger disk"
        return Finding(_SUBJECT, "cache", "warning", text, cure)
    return Finding(_SUBJECT, "cache", "ok", text)


def _token() -> Finding:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable):
            return Finding(_SUBJECT, "token", "ok", f"present (in {variable})")
    file = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
    if os.path.isfile(file):
        return Finding(_SUBJECT, "token", "ok", "present (in a file)")
    return Finding(_SUBJECT, "token", "ok", "none (public weights need none; for gated ones: hf auth login)")
