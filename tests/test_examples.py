"""The examples are run as a user would run them, on less data."""

import re
from pathlib import Path

import pytest
from tests.processes import python

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quickstart_learns_and_gives_the_saved_outputs_again() -> None:
    text = python(EXAMPLES / "quickstart.py", "--rows", 160, "--test-rows", 48)
    differences = re.findall(r"by at most (\S+)", text)
    assert len(differences) == 2
    assert all(float(d) < 1e-5 for d in differences)
    shares = re.findall(r"accuracy there ([\d.]+)% before training, ([\d.]+)% after", text)
    assert len(shares) == 2
    assert all(float(after) > float(before) + 20 for before, after in shares)
    assert (EXAMPLES / "quickstart.py").read_text(encoding="utf-8").count("\n") <= 80  # read in one go


def test_trainer_learns_and_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small random model in place of SmolLM2, which is not installed here."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from data import minilm_folder

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    text = python(EXAMPLES / "trainer.py", "--model", tmp_path, "--steps", 8)
    found = re.search(r"held-out tweets ([\d.]+) before, ([\d.]+) after 8 steps", text)
    assert found is not None
    assert float(found[2]) < float(found[1])
    assert re.search(r"checkpoint-4/adapter_model.safetensors: [\d,]+ bytes", text)
    assert float(re.findall(r"by at most (\S+)", text)[0]) < 1e-4


def test_multitask_prints_every_choice_and_probes() -> None:
    layers = r".*\.5\..*\.(query|value)"
    text = python(EXAMPLES / "multitask.py", "--rows", 24, "--test-rows", 8, "--layers", layers)
    assert "labels of the model now: negative, positive, tweet, amazon, movie, nyt" in text
    rows = re.findall(r"^(\w+), (delta|core)(, iso)? +([\d.]+)% .*?([\d.]+)% \(", text, re.MULTILINE)
    assert len(rows) == 16
    figures = {(method, space, iso): (a, b) for method, space, iso, a, b in rows}
    for method in ("linear", "tsv"):  # these are the same in both spaces
        assert figures[method, "delta", ""] == figures[method, "core", ""]
    probes = re.findall(r"^(the bare base|tweet-polarity|source-domain|both|tsv) +([\d.]+)% ", text, re.MULTILINE)
    assert len(probes) == 5
    assert all(float(share) > 40 for _, share in probes)


def test_disturbance_prints_what_every_sum_keeps() -> None:
    text = python(EXAMPLES / "disturbance.py", "--rows", 8, "--test-rows", 4, "--weights", 1)
    rows = re.findall(r"^(\S+) +(\S+) +1 +([\d.]+)% +([\d.]+)%$", text, re.MULTILINE)
    assert len(rows) == 3 * 3
    share = {(one, other): float(disturbance) for one, other, disturbance, _ in rows}
    for one in ("polarity", "domain"):
        assert share[one, "random"] < share[one, "polarity-16"]
    assert len(re.findall(r"cut to 99 % +[\d.]+%", text)) == 3
