"""Finding an adapter: on this machine, or on the Hugging Face hub and in its local cache."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from adapterkit.door import broken_link, check_may_open
from adapterkit.errors import CheckpointError, nearest, warn
from adapterkit.files.folder import WEIGHTS_FILES, local_path
from adapterkit.formats import CONFIG_FILE, warn_of_weights_beside

# Files end like this, and repositories of the hub do not.
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")
# What diffusers calls a file of all adapters of a pipeline, which has no config beside it.
_DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
# Other libraries' messages are cut there.
_LONGEST = 200
# Adapters that a message lists.
_SHOWN = 8


def adapter_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local folder, or file, of an adapter given by a path or a hub id (`"user/name"`), fetched if need be.

    A folder in which diffusers saved adapters gives their file. A folder that is not an adapter, but has one below,
    gives that one with a warning.

    Raises:
        CheckpointError: neither a folder nor something the hub, or its cache, has; or a folder with several adapters.
    """
    path = check_may_open(local_path(source))
    if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises on names that are too long
        if subfolder:
            raise CheckpointError(f"{path} is a file, so it has no subfolder {subfolder!r}.")
        return path
    if os.path.isdir(path):  # noqa: PTH112 - as above
        place = check_may_open(path / subfolder if subfolder else _below(path, source) or path)
    else:
        fetch = functools.partial(_snapshot, source, revision=revision, cache_dir=cache_dir, token=token)
        names = (CONFIG_FILE, *WEIGHTS_FILES, *_DIFFUSERS)
        folder = PurePosixPath(subfolder or "")
        path = fetch(allow_patterns=[str(folder / name) for name in names])
        below = None if subfolder or _is_adapter(path) else _below(fetch(allow_patterns=[f"*/{CONFIG_FILE}"]), source)
        if below is not None:
            folder = PurePosixPath(below.relative_to(path).as_posix())
            fetch(allow_patterns=[str(folder / name) for name in names])
        _look_beside(hub_id(source), folder, revision, token)
        place = path / folder
    if (place / CONFIG_FILE).exists():
        return place
    return next((place / name for name in _DIFFUSERS if (place / name).is_file()), place)


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG_FILE, *_DIFFUSERS))


def _below(folder: Path, source: object) -> Path | None:
    """Where a folder is no adapter, the one adapter in a folder below; `None`: there is none, or it is one itself.

    Args:
        source: what messages call it.

    Raises:
        CheckpointError: there are several.
    """
    if _is_adapter(folder):
        return None
    found = sorted(place.parent for depth in ("*", "*/*") for place in folder.glob(f"{depth}/{CONFIG_FILE}"))
    inside = [place.relative_to(folder).as_posix() for place in found]
    if len(inside) > 1:
        listed = ", ".join(inside[:_SHOWN]) + (f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else "")
        raise CheckpointError(f"{source} is not an adapter, but holds {len(inside)}: {listed}. Give one of them.")
    if inside:
        warn(f"{source} is not an adapter; the one below is read: {inside[0]}.")
    return next(iter(found), None)


def model_folder(source: str | Path) -> Path:
    """The local folder, or file, of a model given by a path or a hub id, fetched if need be: all but other formats.

    Raises:
        CheckpointError: neither a folder nor something the hub, or its cache, has.
    """
    path = check_may_open(local_path(source))
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        return path
    other_formats = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "*.ot", "*.tflite"]
    return _snapshot(source, ignore_patterns=other_formats)


def _snapshot(source: str | Path, **arguments: Any) -> Path:
    repo = hub_id(source)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=hub_is_unreachable(), **arguments))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise hub_error(repo, error) from error


def hub_is_unreachable() -> bool:
    """Whether the hub's name leads nowhere from here. Its functions would try again and again, for half a minute."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if host is None or getproxies():  # a proxy finds the hub
        return False
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False


def _look_beside(repo: str, folder: PurePosixPath, revision: str | None, token: str | bool | None) -> None:
    """Warn of weights beside an adapter on the hub, which are not fetched. Without the hub, nothing is checked.

    Args:
        folder: the adapter's in the repository.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if hub_is_unreachable():
        return
    try:
        found: Any = huggingface_hub.HfApi().model_info(repo, revision=revision, token=token, timeout=5)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return
    names = (PurePosixPath(file.rfilename) for file in found.siblings or ())
    warn_of_weights_beside(repo, (name.name for name in names if name.parent == folder))


def hub_id(source: str | Path, what: str = "folder") -> str:
    """The hub id in a source that is not a local path.

    Raises:
        CheckpointError: it can only be meant as a path: by its form, or because the folder that it would be in is here.
    """
    text, path = str(source), local_path(source)
    formed = isinstance(source, Path) or text.count("/") > 1 or text.startswith((".", "~")) or text.endswith("/")
    if formed or path.suffix in _FILES or ("/" in text and os.path.isdir(path.parent)):  # noqa: PTH112 - as above
        raise CheckpointError(
            f"There is no {what} {text!r} (working directory: {_here()}).{broken_link(path) or _nearest(path)}"
        )
    return text


def _here() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "deleted"


def _nearest(path: Path) -> str:
    try:
        close = nearest(path.name, (p.name for p in path.parent.iterdir()))
    except OSError:
        return ""
    return f" Nearest: {', '.join(repr(str(path.with_name(name))) for name in close)}." if close else ""


def hub_error(repo: str, error: BaseException) -> CheckpointError:
    """The error for what is neither here nor on the hub, with the reason in one line."""
    from huggingface_hub import constants, errors

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    reasons = {
        errors.HFValidationError: "a repository cannot have this name",
        errors.GatedRepoError: "its owner has to grant access to it; log in, or give a token",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private",
        errors.LocalEntryNotFoundError: f"it is not in the cache, and {why}",
    }
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    first = (str(error).strip().splitlines() or [""])[0]
    unknown = f"{type(error).__name__}: {first[:_LONGEST]}".rstrip(".")
    known = (text for kind, text in reasons.items() if any(isinstance(link, kind) for link in chain))
    return CheckpointError(
        f"{repo!r} is not a folder here (working directory: {_here()}), and could not be read from the hub or its "
        f"cache: {next(known, unknown)}.{_nearest(Path(repo))}"
    )
