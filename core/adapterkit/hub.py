"""Finding an adapter: on this machine, or on the Hugging Face hub and in its local cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from adapterkit.errors import CheckpointError
from adapterkit.files import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, local_path


def adapter_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local folder, or file, of an adapter given by a path or a hub id (`"user/name"`), fetched if need be.

    Raises:
        CheckpointError: neither a folder nor something the hub, or its cache, has.
    """
    path = local_path(source)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises on names that are too long
        return path / subfolder if subfolder else path
    if os.path.isfile(path):  # noqa: PTH113 - as above
        if subfolder:
            raise CheckpointError(f"{path} is a file, so it has no subfolder {subfolder!r}.")
        return path
    text = str(source)
    if isinstance(source, Path) or text.count("/") > 1 or text.startswith((".", "~")) or not text:
        raise CheckpointError(f"There is no folder {text!r} (working directory: {Path.cwd()}).")
    return _fetch(text, revision, subfolder, cache_dir, token)


def model_folder(source: str | Path) -> Path:
    """The local folder, or file, of a model given by a path or a hub id, fetched if need be: all but other formats.

    Raises:
        CheckpointError: neither a folder nor something the hub, or its cache, has.
    """
    path = local_path(source)
    if path.exists():
        return path
    text = str(source)
    if isinstance(source, Path) or text.count("/") > 1 or text.startswith((".", "~")) or not text:
        raise CheckpointError(f"There is no folder {text!r} (working directory: {Path.cwd()}).")
    other_formats = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "*.ot", "*.tflite"]
    return _snapshot(text, ignore_patterns=other_formats)


def _fetch(
    repo: str,
    revision: str | None,
    subfolder: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
) -> Path:
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + name for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE)]
    root = _snapshot(repo, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=patterns)
    return root / subfolder if subfolder else root


def _snapshot(repo: str, **arguments: Any) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repo, **arguments))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{repo!r} is no folder here (working directory: {Path.cwd()}), and could not be had from the hub or its "
            f"cache: {type(error).__name__}: {error}"
        ) from error
