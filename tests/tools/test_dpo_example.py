"""The example with TRL's DPO runs as a user would run it, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.processes import python
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"

pytest.importorskip("trl")


def test_dpo_runs_and_gives_the_saved_outputs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small random model in place of SmolLM2, whose tokenizer it has."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from data import LANGUAGE_MODEL

    if not LANGUAGE_MODEL.is_dir():
        pytest.skip("`make test-tools` makes the language model")
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    said = python(EXAMPLES / "dpo.py", "--model", tmp_path, "--method", "loha", "--steps", 4)
    assert re.search(r"prefers the favourable one of two held-out reviews: \d+% of 24", said)
    assert float(re.findall(r"by at most (\S+)", said)[0]) < 1e-5
