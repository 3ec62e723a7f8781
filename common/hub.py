"""To and from the Hugging Face hub. Nothing is sent but by ``push``, and no token is read or shown here."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.config import ConfigError

PREFIX = "hf-hub:"
# What comes down with a folder: weights, ONNX, words. No program (a .pt2 is one) and no pickle, unless asked for
# by name.
PULLED = ("*.json", "*.safetensors", "*.md", "*.onnx", "*.onnx.data")
_NAME = re.compile(r"(?P<repository>[^/@\s]+/[^/@\s]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>\S+))?")


class Address(NamedTuple):
    """``hf-hub:USER/NAME[/FILE][@REVISION]``."""

    repository: str
    file: str | None
    revision: str | None


def address(text: str) -> Address:
    """Raises ConfigError for what is none."""
    match = _NAME.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        raise ConfigError(f"{text}: no name on the hub. Give hf-hub:USER/NAME, with /FILE for one file of it and "
                          "@REVISION for another than its newest.")
    return Address(match["repository"], match["file"], match["revision"])


def local(path: str | os.PathLike) -> Path:
    """``path`` itself, or where the folder or the file that it names on the hub lies now, downloaded if need be.

    The download goes to the hub's own cache; with HF_HUB_OFFLINE=1 only that is looked at. Raises ConfigError.
    """
    path = os.fspath(path)
    if not path.startswith(PREFIX):
        return Path(path)
    repository, file, revision = address(path)
    hub = _library()
    with _explained(path):
        if file is not None:
            return Path(hub.hf_hub_download(repository, file, revision=revision))
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(PULLED)))


def push(folder: Path, name: str, private: bool = False) -> str:
    """Send the files of an export to the model repository ``USER/NAME``, made if it is not there; gives its address.

    The user is whom ``hf auth login`` or HF_TOKEN says. Raises ConfigError: for a name that is none, where the hub
    refuses, and where the repository is public and ``private`` was asked for.
    """
    check_repository(name)
    api = _library().HfApi()
    with _explained(name):
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ConfigError(f"--push-to-hub {name}: it is there already, and public. Nothing was sent. Make it "
                              "private on the hub, give another name, or leave --private away.")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export: {folder.name}")
    return f"{api.endpoint}/{name}"


def check_repository(name: str) -> None:
    """Raises ConfigError for what is not USER/NAME."""
    match = _NAME.fullmatch(name)
    if match is None or match["file"] or match["revision"]:
        raise ConfigError(f"--push-to-hub {name}: no name of a repository. Give USER/NAME.")


def _library() -> Any:
    try:
        import huggingface_hub  # comes with timm; half a second that most exports need not wait
    except ImportError as error:
        raise ConfigError("huggingface_hub is not installed: pip install huggingface_hub.") from error
    return huggingface_hub


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """The hub's errors in one sentence, with what to do."""
    from huggingface_hub import errors

    try:
        yield
    except ValueError as error:                 # HFValidationError, or a file that lies outside its repository
        raise ConfigError(f"{name}: no name that the hub allows: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConfigError(f"{name}: neither in the hub's cache on this machine nor to be had from {_endpoint()}. Is "
                          "there a network, and is HF_HUB_OFFLINE unset?") from error
    except ConnectionError as error:
        raise ConfigError(f"{name}: {_endpoint()} is not to be reached: {error}") from error
    except (errors.LocalTokenNotFoundError, errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise ConfigError(f"{name}: the hub has no such repository for you. Check the name; for what is yours or "
                          "private, log in: hf auth login.") from error
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise ConfigError(f"{name}: the repository has no such file or revision.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise ConfigError(f"{name}: {_endpoint()} refused ({status}). Log in with a token that may write: hf auth "
                          "login.") from error


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
