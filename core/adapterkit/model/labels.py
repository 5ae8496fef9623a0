"""Label sets: which classes an adapter's head tells apart, and the model's config following it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from adapterkit.errors import CheckpointError, ConfigError

METADATA_KEY = "adapterkit.id2label"


@dataclass(frozen=True)
class LabelSet:
    """The classes of one head, and the kind of loss transformers settled on for them.

    Attributes:
        id2label: class names by number, from 0 up.
        problem_type: transformers' `config.problem_type`, which it sets at the first loss and keeps.
        label2id: `config.label2id` where it may be more than the reverse of `id2label`: the model's own.
    """

    id2label: Mapping[int, str]
    problem_type: str | None = None
    label2id: Mapping[str, int] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The model's present label set, or `None` if its config has none."""
        config = getattr(model, "config", None)
        id2label = getattr(config, "id2label", None)
        if not isinstance(id2label, Mapping) or not id2label:
            return None
        try:
            numbered = {int(k): str(v) for k, v in id2label.items()}
        except (TypeError, ValueError):  # some other thing of that name
            return None
        label2id = getattr(config, "label2id", None)
        return cls(numbered, getattr(config, "problem_type", None), label2id)

    @classmethod
    def numbered(cls, count: int) -> Self:
        """Classes that have no names yet: `LABEL_0` and so on, as transformers calls them."""
        return cls({i: f"LABEL_{i}" for i in range(count)})

    @classmethod
    def chosen(cls, num_labels: int | None, id2label: Mapping[int, str] | None) -> Self | None:
        """The label set that `add(..., num_labels=, id2label=)` asks for; `None`: the model's own.

        Raises:
            ConfigError: not a positive number, numbers with gaps, or two values that disagree.
        """
        if num_labels is None and id2label is None:
            return None
        if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
            raise ConfigError(f"num_labels = {num_labels!r} must be a positive number of classes.")
        if id2label is None:
            assert num_labels is not None
            return cls.numbered(num_labels)
        if not isinstance(id2label, Mapping):
            raise ConfigError(f"id2label = {id2label!r} must be a mapping from class numbers to names.")
        if set(id2label) != set(range(len(id2label))) or not id2label:
            raise ConfigError(f"id2label must number its classes 0, 1, 2, ... without gaps, not {list(id2label)}.")
        if num_labels not in (None, len(id2label)):
            raise ConfigError(f"num_labels = {num_labels} disagrees with id2label, which has {len(id2label)} classes.")
        return cls({i: str(id2label[i]) for i in range(len(id2label))})

    def apply(self, model: nn.Module) -> None:
        """Make the model's config, and what it computes its loss from, follow this label set."""
        config: Any = model.config
        config.id2label = dict(self.id2label)
        reverse = {name: i for i, name in self.id2label.items()}
        config.label2id = reverse if self.label2id is None else self.label2id
        config.problem_type = self.problem_type
        if "num_labels" in model.__dict__:
            model.num_labels = len(self.id2label)  # type: ignore[assignment]

    def seen(self, model: nn.Module) -> Self:
        """This label set with the problem type the model's config has come to since."""
        return replace(self, problem_type=getattr(model.config, "problem_type", None))

    def to_metadata(self) -> dict[str, str]:
        """For the safetensors header: `adapter_config.json` stays PEFT's."""
        return {METADATA_KEY: json.dumps({str(i): name for i, name in self.id2label.items()})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self | None:
        """The label set in a safetensors header, or `None` if there is none.

        Raises:
            CheckpointError: it is there but malformed.
        """
        text = metadata.get(METADATA_KEY)
        if text is None:
            return None
        try:
            found = {int(i): str(name) for i, name in json.loads(text).items()}
            return cls.chosen(None, found)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"The file's label set is malformed: {text[:80]!r}.") from error
