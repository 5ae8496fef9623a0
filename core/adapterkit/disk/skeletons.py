"""Skeletons: a model on the meta device, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.errors import AdapterError, CheckpointError, UnsupportedError
from adapterkit.files import hub_id, local_path, not_to_be_had

CONFIG = "config.json"


def skeleton(
    model: str | Path,
    *,
    architecture: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """The model of a folder or of a hub id, on the meta device: every module, shape and tie, and no values.

    It is built by transformers from `config.json` alone, as the class that its `architectures` name (or by
    `AutoModel`, if they name none), in the config's dtype and in eval mode. Seconds for any size.
    `ak.select(ak.skeleton(folder), config)` tells what a config would adapt.

    Args:
        architecture: the class to build, in place of the config's.
        revision, cache_dir, token: where to look on the hub.

    Raises:
        CheckpointError: there is no config, or none that transformers can make a model of.
        UnsupportedError: the model's code is not in transformers but beside its weights. Such code is not run here:
            build the model yourself, under `torch.device("meta")`.
    """
    where = _config_source(model)
    config = _config(where, {"revision": revision, "cache_dir": cache_dir, "token": token})
    if architecture is not None:
        config.architectures = [architecture]
    cls = _class(config)
    if architecture not in (None, cls.__name__):
        raise CheckpointError(f"transformers has no model of the class {architecture!r}.")
    with _as_checkpoint_error(f"transformers cannot build a {cls.__name__} from the config of {where}"):
        with torch.device("meta"):
            built: nn.Module = cls._from_config(config)
        return built.eval()


@contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """Whatever a config's values make transformers and its models raise."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


def _config_source(model: str | Path) -> str:
    path = local_path(model)
    if path.is_file():
        path = path.parent
    if path.is_dir():
        if not (path / CONFIG).is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise CheckpointError(f"{path} is no model: it has no {CONFIG}. It holds {found}.")
        return str(path)
    return hub_id(model, "model folder")


def _config(where: str, hub: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    with _as_checkpoint_error(f"There is no config of a model for {where!r}"):
        try:
            raw, _ = PretrainedConfig.get_config_dict(where, **hub)
        except OSError as error:
            if Path(where).is_dir():
                raise
            raise not_to_be_had(where, error) from error
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
            raise UnsupportedError(
                f"{where}: the model is code beside its weights ({raw['auto_map']}), which is not run here. Build it "
                'yourself under torch.device("meta").'
            )
        return AutoConfig.from_pretrained(where, trust_remote_code=False, **hub)


def _class(config: Any) -> Any:
    """The class that the config's architecture names, else the base model's."""
    import transformers

    named = config.architectures if isinstance(config.architectures, list) else []
    for name in named:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    known = transformers.MODEL_MAPPING
    if type(config) not in known:
        raise CheckpointError(
            f"Its config names the architecture {named}, which transformers {transformers.__version__} "
            f"has not, nor a base model for {type(config).__name__}."
        )
    return known[type(config)]
