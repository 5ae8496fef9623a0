"""A tokenizer and texts for the tiny models' vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
from tests.models import VOCABULARY

datasets = pytest.importorskip("datasets")


def tokenizer(**options: Any) -> Any:
    """Words `w0`, `w1`, ... of the tiny models' vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **{"model_max_length": 16, **special, **options})


def sentence(start: int, step: int = 3, count: int = 8) -> str:
    """Words, each of which follows from the one before."""
    return " ".join(f"w{4 + (start + step * i) % (VOCABULARY - 4)}" for i in range(count))


def texts(count: int = 16) -> Any:
    """A data set of sentences."""
    return datasets.Dataset.from_dict({"text": [sentence(start) for start in range(count)]})
