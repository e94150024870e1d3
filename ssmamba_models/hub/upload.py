"""A folder to the Hub, in one commit: all of it is published, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssmamba_models._version import __version__
from ssmamba_models.notice import first_line


def check_repo_id(repo_id: str) -> None:
    """Refuse what the Hub would refuse, before any work.

    Raises:
        ValueError: `repo_id` is not ORG/NAME.
    """
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"the repository {repo_id!r} is not ORG/NAME, such as my-lab/ssmamba_tiny.my_tiles")
    validate_repo_id(repo_id)


def upload(
    folder: Path,
    files: Sequence[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Publish files; the repository and the revision are made where they are not there.

    Args:
        folder: holds the files.
        files: their names.
        repo_id: ORG/NAME.
        private: whether only its members may see the repository.
        token: None takes HF_TOKEN, or that of `hf auth login`.
        revision: branch; None means main.

    Returns:
        The address of the commit.

    Raises:
        ValueError: `private`, and the repository is there and public.
        OSError: it cannot be written, or reached; nothing is published then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="ssmamba_models", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        public = private and not api.model_info(repo_id).private
        if not public:
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            # Not upload_folder, which may cut an upload into several commits.
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
            commit = api.create_commit(
                repo_id, operations, commit_message="Publish weights with ssmamba publish", revision=revision
            )
    # The hub's client raises its own errors, ValueError, and those of requests or httpx, whichever it builds on.
    except Exception as error:
        raise OSError(_explain(error, repo_id, api.endpoint)) from error
    if public:
        raise ValueError(f"{repo_id!r} is there and public; make it private in its settings, or leave --private out")
    return str(commit.commit_url)


def _explain(error: Exception, repo_id: str, where: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: nothing can be uploaded; unset it, or write a folder with --dry-run DIR"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return (
            f"{where} does not let you write {repo_id!r}: log in with a token that may write (hf auth login), "
            "or give it by HF_TOKEN or --token"
        )
    reason = first_line(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
    return f"the upload to {repo_id!r} on {where} did not end ({reason}); nothing of it is published: try again"
