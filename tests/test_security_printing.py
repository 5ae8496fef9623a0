"""What files put into text reaches no terminal: `adapterkit inspect`, `diff`, `report`, and every error and warning."""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.command.conftest import run

import adapterkit as ak

# The clipboard, a cleared screen, a title, C1's escape, a deletion, the other direction, and ends of lines.
ATTACKS = {
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "screen": "\x1b[2J\x1b[H",
    "c1": "\x9b2J",
    "delete": "\x7f\x08\x08\x08",
    "direction": "\u202egnp.exe\u2066",
    "line": "\nnote: forged",
    "return": "\rnote: forged",
    "separator": "\u2028note: forged\x85note: forged",
    "invisible": "\ufeff\u200b\U000e0041",
}


def hostile(folder: Path, text: str, *, fits: bool = False) -> Path:
    """A LoRA adapter with this text in every place that holds text; unless it `fits`, with a tensor of nothing."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": [f"query{text}"],
        "rank_pattern": {f"value{re.escape(text)}": 3},
        "base_model_name_or_path": f"base{text}",
        "revision": text,
        "task_type": "SEQ_CLS",
        "modules_to_save": [f"head{text}"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.layer.0{text}.query{text}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(2, 4),
        f"{prefix}.lora_B.weight": torch.ones(4, 2),
        f"base_model.model.head{text}.weight": torch.ones(2, 4),
    } | ({} if fits else {f"unknown{text}": torch.ones(2)})
    labels = {"id2label": json.dumps({"0": f"good{text}", "1": f"bad{text}"})}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt", "note": text, **labels})
    return folder


def unseen(text: str) -> set[str]:
    """Characters that a terminal obeys or does not show."""
    return {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_commands_print_of_files_is_plain(attack: str, tmp_path: Path) -> None:
    place, other = hostile(tmp_path / "a", ATTACKS[attack]), hostile(tmp_path / "b", "x")
    calls = (
        ("inspect", str(place)),
        ("inspect", "--headers-only", str(place)),
        ("diff", str(place), str(other)),
        ("check", str(place), "--for", "vllm"),
        ("convert", str(place), "--out", str(tmp_path / "out")),
        ("combine", str(place), str(other), "--out", str(tmp_path / "out")),
        ("report", str(place), "--out", str(tmp_path / "page.html")),
    )
    for call in calls:
        done = run(*call)
        assert done.stdout + done.stderr
        assert not unseen(done.output), call
        assert not [line for line in done.output.splitlines() if line.startswith("note: forged")], call


@pytest.mark.parametrize("attack", ATTACKS)
def test_errors_and_warnings_of_a_load_are_plain(attack: str, tmp_path: Path) -> None:
    place = hostile(tmp_path / "a", ATTACKS[attack])
    adapters = ak.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for strict in (True, False):
            with pytest.raises(ak.AdapterError) as error:
                adapters.load(place, "a", strict=strict)
            assert not unseen(str(error.value))
            assert "\nnote: forged" not in str(error.value)
    assert not [w for w in caught if unseen(str(w.message))]


@pytest.mark.parametrize("error", [ak.ConfigError, ak.SaveError, ak.UnknownNameError, ak.AdapterWarning])
def test_every_error_is_one_plain_line(error: type[Exception]) -> None:
    for text in ATTACKS.values():
        assert not unseen(str(error(text)))
        assert str(error(f"no such layer: {text}")).count("\n") == 0


def test_details_below_a_message_keep_their_lines() -> None:
    assert str(ak.CheckpointError("It does\nnot fit.", "  a\n  b\x1b")) == "It does not fit.\n  a\n  b\\x1b"


def test_a_load_that_is_not_strict_warns_with_the_lines_of_its_report(tmp_path: Path) -> None:
    model = torch.nn.Sequential()
    model.query = torch.nn.Linear(4, 4)
    with pytest.warns(ak.AdapterWarning) as caught:
        ak.attach(model).load(odd_adapter(tmp_path / "a"), "a", strict=False)
    lines = str(caught[0].message).split("\n")
    assert lines == [f"{tmp_path / 'a'}:", "the tensors do not fit this adapter", "  unexpected (1):", "    odd\\x1b"]


def odd_adapter(place: Path) -> Path:
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["query"]}))
    factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    tensors = {f"base_model.model.query.lora_{name}.weight": tensor for name, tensor in factors.items()}
    save_file(tensors | {"odd\x1b": torch.ones(1)}, place / "adapter_model.safetensors")
    return place


def test_text_of_all_languages_is_shown_as_it_is() -> None:
    for text in ("naïve", "日本語 の", "שלום", "👩\u200d🔬", "हिन्दी"):
        assert str(ak.ConfigError(text)) == text


def test_json_holds_what_the_file_says_and_prints_it_escaped(tmp_path: Path) -> None:
    text = "".join(ATTACKS.values())
    done = run("inspect", "--json", str(hostile(tmp_path / "a", text)))
    assert not unseen(done.stdout)
    assert json.loads(done.stdout)["base"] == f"base{text}"


@pytest.mark.parametrize("long", ["x" * 3_000_000, "x " * 1_000_000, "\x1b" * 1_000_000])
def test_long_values_are_cut_where_they_are_quoted(long: str, tmp_path: Path) -> None:
    place = hostile(tmp_path / "a", "")
    for field in ("peft_type", "r", "target_modules", "base_model_name_or_path", "nobody_knows"):
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps({**config, field: long}))
        for call in (("inspect", str(place)), ("targets", str(place), "--config", str(place))):
            assert len(run(*call).output) < 20_000, (field, call)
        (place / "adapter_config.json").write_text(json.dumps(config))


def test_a_page_is_plain(tmp_path: Path) -> None:
    place = hostile(tmp_path / "a", ATTACKS["direction"], fits=True)
    ak.write_report([place], tmp_path / "page.html", names=["\x1b[2J\u202e"])
    assert not unseen((tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore::adapterkit.AdapterWarning")
def test_a_file_that_names_thousands_of_things_fills_no_terminal(tmp_path: Path) -> None:
    place, other = hostile(tmp_path / "a", ""), hostile(tmp_path / "b", "")
    config = json.loads((place / "adapter_config.json").read_text())
    config |= {f"field{i}": i for i in range(3000)} | {"modules_to_save": [f"head{i}" for i in range(3000)]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    with safe_open(place / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    tensors |= {f"base_model.model.head{i}.weight": torch.ones(1) for i in range(500)}
    save_file(tensors, place / "adapter_model.safetensors", {f"note{i}": "x" for i in range(3000)})
    for call in (("inspect", str(place)), ("diff", str(place), str(other))):
        done = run(*call)
        assert done.exit_code in (0, 1), done.output
        assert len(done.output) < 20_000, done.output[:2000]
