"""Models of the Hugging Face Hub: their files, in the cache of huggingface_hub, and new ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ncsn_fast.checkpoints.torch_file import CheckpointError

log = logging.getLogger(__name__)
# OWNER/NAME of a repository, and the revision.
_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^@\s]+))?")
_FILES = (".pth", ".pt", ".pkl", ".ckpt", ".bin", ".safetensors")  # ends of files, not of names
_DESCRIPTIONS = (
    "config.json", "unet/config.json", "scheduler/scheduler_config.json", "scheduler_config.json"
)  # fmt: skip
_WEIGHTS = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
)  # fmt: skip
TABLE_NAME = "fast_table.json"  # of a tuned model, in its folder
_EXTRA = "which needs huggingface_hub: pip install 'ncsn_fast[hub]'"


def is_name(source: str | Path) -> bool:
    """Tells whether a source that does not exist is OWNER/NAME of a repository.

    What lies below an existing folder stays a path, and so does the name of a file.
    """
    text = str(source)
    if _NAME.fullmatch(text) is None or text.endswith(_FILES) or Path(text).exists():
        return False
    return not Path(text.split("/")[0]).is_dir()


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """Downloads the files of a model that are not in the cache, and returns where they are.

    It is a folder, or the one checkpoint of a repository without a config.json. With
    HF_HUB_OFFLINE=1 the cache alone is looked at.

    Args:
        source: OWNER/NAME, or OWNER/NAME@REVISION.
        revision: branch, tag or commit; None for that of source, or the default branch.

    Raises:
        CheckpointError: no such repository or revision, no connection, no permission, or no model.
    """
    match = _NAME.fullmatch(str(source))
    assert match is not None
    repo, wanted = match["repo"], revision or match["revision"]
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{source} does not exist here; it may be a name on the Hugging Face Hub, {_EXTRA}"
        ) from error
    try:
        if constants.HF_HUB_OFFLINE:
            wanted_files = list(_DESCRIPTIONS)
        else:
            found = HfApi().model_info(repo, revision=wanted)
            names = [sibling.rfilename for sibling in found.siblings or []]
            wanted_files = _chosen(names, repo)
        folder = Path(
            snapshot_download(
                repo,
                revision=wanted,
                allow_patterns=wanted_files,
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except CheckpointError:
        raise
    except Exception as error:  # of HTTP, of the operating system, or of huggingface_hub
        raise CheckpointError(_line(error, str(source))) from error
    log.info("%s: revision %s of the Hub, in %s", repo, folder.name, folder)
    if any((folder / name).exists() for name in _DESCRIPTIONS[:2]):
        return folder
    files = sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".pt", ".pkl"))
    if len(files) != 1:
        raise CheckpointError(f"{source}: {folder} in the Hub's cache holds no model")
    return files[0]


def _chosen(names: Iterable[str], repo: str) -> list[str]:
    """The files of a repository that hold its model."""
    known = set(names)
    described = [name for name in _DESCRIPTIONS if name in known]
    prefix = "unet/" if "unet/config.json" in known else ""
    weights = [prefix + name for name in _WEIGHTS if prefix + name in known]
    if described and weights:
        return [*described, weights[0], *known & {TABLE_NAME}]
    files = sorted(name for name in known if name.endswith((".pth", ".pt", ".pkl")))
    if len(files) == 1 and "/" not in files[0]:
        return files
    held = ", ".join(sorted(known)[:6]) or "nothing"
    remedy = (
        f"download the one you want, huggingface_hub.hf_hub_download({repo!r}, {files[0]!r}), and "
        "load that file"
        if files
        else "a model folder, a folder of diffusers, or one .pth or .pkl is read"
    )
    raise CheckpointError(f"{repo} on the Hub is no model that is known ({held}); {remedy}")


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload a model of ncsn_fast",
) -> str:
    """Uploads a model folder to a repository, which is made if there is none; returns its address.

    A table of method "fast" that is there, of another model, does not stay.

    Raises:
        CheckpointError: no permission, no connection, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise CheckpointError(f"cannot push to the Hugging Face Hub, {_EXTRA}") from error
    try:
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(address.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=[TABLE_NAME],  # what the folder holds is not deleted
        )
    except Exception as error:  # of HTTP, of the operating system, or of huggingface_hub
        raise CheckpointError(_line(error, repo_id)) from error
    return str(address)


def _line(error: Exception, name: str) -> str:
    """One line about an error of huggingface_hub, and what to do."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        return (
            f"{name} is neither a file or folder here, nor in the Hub's cache, and HF_HUB_OFFLINE "
            "forbids to look further: unset it, or download the model where there is a connection"
        )
    if "GatedRepoError" in kinds:
        return (
            f"{name} on the Hub is gated: accept its terms on its page, then log in (hf auth login)"
        )
    if "RevisionNotFoundError" in kinds:
        return f"{name} on the Hub has no such revision; see its branches, tags and commits"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{name} is neither a file or folder here, nor a repository of the Hub that you may "
            "read: check the name, or log in (hf auth login) if it is private"
        )
    if status in (401, 403):
        return f"the Hub does not let you write {name}: log in (hf auth login) as who may"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if {"ConnectError", "TimeoutException", "ConnectionError", "Timeout"} & set(kinds):
        return (
            f"{name} is no file or folder here, and the Hub cannot be reached "
            f"({reason:.200}); with HF_HUB_OFFLINE=1 its cache is used"
        )
    return f"{name}, on the Hub: {reason:.300}"
