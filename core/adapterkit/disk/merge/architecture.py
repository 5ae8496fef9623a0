"""Which class of model a merge is for, where the base's config names one that the adapters are not of.

A base is often stored without its task's head, and then its config names the bare model; the adapters know more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adapterkit.contract import FILE_PREFIX
from adapterkit.disk.merge.sources import Source
from adapterkit.disk.skeletons import skeleton
from adapterkit.errors import AdapterError, CheckpointError
from adapterkit.files import WEIGHTS_FILE, read_config, read_header

# By PEFT's `task_type`, transformers' tables from a config's class to the model's.
_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
}


def fitting(base: Path, sources: Sequence[Source], architecture: str | None) -> tuple[nn.Module, str | None]:
    """The model that a merge is for, and its class if that is not the one that the base's config names.

    It is of `architecture`; else as the config says; else of the adapters' task, if only that has their modules.

    Raises:
        CheckpointError: the config's lacks modules that the adapters name, and their task does not say which has them.
    """
    if architecture is not None:
        return skeleton(base, architecture=architecture), architecture
    built = skeleton(base)
    wanted = {name for source in sources for name in _outer_modules(source)}
    if _has(built, wanted):
        return built, None
    names = {str(read_config(s.place).get("task_type")) for s in sources if s.place.is_dir()} - {"None"}
    if len(names) == 1:
        model = next(_of_tables(base, built, [_TASKS.get(names.pop(), "")]), None)
        if model is not None and _has(model, wanted):
            return model, type(model).__name__
    others = [type(m).__name__ for m in _of_tables(base, built, _TASKS.values()) if _has(m, wanted)]
    if not others:
        return built, None  # of another model altogether: loading says what does not fit
    lacking = ", ".join(map(repr, sorted(wanted - {n for n, _ in built.named_children()})))
    raise CheckpointError(
        f"The config of {base} names {type(built).__name__}, which has no {lacking}, as the adapters have. Say what "
        f"the model is to be: architecture={others[0]}" + "".join(f", or {name}" for name in others[1:]) + "."
    )


def _outer_modules(source: Source) -> set[str]:
    """The first parts of the paths in an adapter's files."""
    file = source.place / WEIGHTS_FILE
    if not file.is_file():  # another program's, or a pickle: what those name is seen when they are loaded
        return set()
    keys = (entry.name for entry in read_header(file).entries)
    paths = (key.removeprefix(FILE_PREFIX) for key in keys if key.startswith(FILE_PREFIX))
    return {path.partition(".")[0] for path in paths}


def _has(model: nn.Module, names: set[str]) -> bool:
    return names <= {name for name, _ in model.named_children()}


def _of_tables(base: Path, built: Any, tables: Any) -> Iterator[nn.Module]:
    """The models that these tables of transformers' have for a config, each class once."""
    import transformers
    from transformers.utils import logging

    seen: set[str] = set()
    level = logging.get_verbosity()
    for table in tables:
        try:
            found = getattr(transformers, table, {})[type(built.config)]
        except KeyError:
            continue
        name = (found[0] if isinstance(found, tuple) else found).__name__
        if name not in seen:
            seen.add(name)
            logging.set_verbosity_error()  # some classes tell how they are meant to be used
            try:
                made = skeleton(base, architecture=name)
            except AdapterError:
                continue
            finally:
                logging.set_verbosity(level)
            yield made
