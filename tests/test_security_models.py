"""A folder of a model runs no code, reaches no network, and costs little, whatever its config says."""

from __future__ import annotations

import builtins
import io
import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
import transformers
from tests.command.conftest import run
from transformers import CLIPConfig, LlavaConfig

import adapterkit as ak
from adapterkit.disk import model

TEXT = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2}
CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel
class C(PretrainedConfig):
    model_type = "evil"
class M(PreTrainedModel):
    config_class = C
"""


def nested(place: Path, **more: Any) -> dict[str, Any]:
    """A config of code of its own."""
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoBackbone": "evil.M", "AutoModelForCausalLM": "evil.M"}
    return {"model_type": "evil", "auto_map": auto, "_name_or_path": str(place), "name_or_path": str(place), **more}


def hub(place: Path) -> dict[str, Any]:
    evil = nested(place)
    return evil | {"auto_map": {name: f"someone/evil--{ref}" for name, ref in evil["auto_map"].items()}}


ATTACKS = {
    "top": nested,
    "code of the hub": hub,
    "a class that has code": lambda place: {"model_type": "bert", **nested(place, model_type="bert")},
    "vision config": lambda place: {"model_type": "llava", "text_config": TEXT, "vision_config": nested(place)},
    "text config": lambda place: {"model_type": "llava", "text_config": nested(place)},
    "of a config without a model": lambda place: {
        "model_type": "llava",
        "text_config": TEXT,
        "vision_config": nested(place, model_type="altclip_vision_model"),
    },
    "in a list": lambda place: {"model_type": "bert", "parts": [{"deep": [nested(place)]}]},
    "backbone config": lambda place: {"model_type": "upernet", "backbone_config": nested(place)},
    "a backbone of the hub": lambda place: {"model_type": "upernet", "backbone": "someone/evil"},
    "a plain backbone": lambda place: {"model_type": "upernet", "backbone": "resnet18", "use_timm_backbone": False},
    "a backbone by its folder": lambda place: {"model_type": "upernet", "backbone": str(place)},
    "detr": lambda place: {"model_type": "detr", "backbone": "someone/evil", "use_timm_backbone": False},
    "the backbone of a default": lambda place: {"model_type": "detr", "use_timm_backbone": False},
    "an attention kernel": lambda place: {"model_type": "bert", "attn_implementation": "someone/kernel"},
    "a private attention kernel": lambda place: {"model_type": "bert", "_attn_implementation": "someone/kernel"},
    "a nested attention kernel": lambda place: {
        "model_type": "llava",
        "text_config": TEXT | {"_attn_implementation": "someone/kernel@main:x"},
    },
    "an experts kernel": lambda place: {"model_type": "mixtral", "experts_implementation": "someone/kernel"},
    "timm of the hub": lambda place: {"model_type": "timm_wrapper", "architecture": "hf-hub:someone/evil"},
    "timm of a folder": lambda place: {"model_type": "timm_wrapper", "architecture": f"local-dir:{place}"},
    "a class that is no model": lambda place: {"model_type": "bert", "architectures": ["AutoModel", "pipeline", "os"]},
}


# What the config says of code and kernels changes nothing of these models.
BUILT = ("a class that has code", "the backbone of a default", "an experts kernel", "a class that is no model")
BUILT += ("an attention kernel", "a private attention kernel", "a nested attention kernel")


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the user and of the network, which both say yes to everything, in vain."""
    asked: list[str] = []

    def resolve(host: Any, *_: Any, **__: Any) -> NoReturn:
        asked.append(f"network: {host}")
        raise OSError("no network in tests")

    def answer(prompt: object = "") -> str:
        asked.append(f"prompt: {prompt}")
        return "y"

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: resolve(address))
    monkeypatch.setattr(builtins, "input", answer)
    return asked


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_config_runs_code_asks_or_reaches_the_network(attack: str, closed: list[str], tmp_path: Path) -> None:
    place, marker = tmp_path / "model", tmp_path / "ran"
    place.mkdir()
    (place / "evil.py").write_text(CODE.format(marker=str(marker)))
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    (place / "config.json").write_text(json.dumps(small | ATTACKS[attack](place)))
    for call in (("targets", str(place)), ("inspect", str(place / "none"), "--base", str(place))):
        done = run(*call)
        assert done.exit_code in (0, 1), done.output
    if attack in BUILT:
        ak.skeleton(place)
    else:
        with pytest.raises((ak.CheckpointError, ak.UnsupportedError)):
            ak.skeleton(place)
    assert not closed
    assert not marker.exists()
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_other_threads_may_fetch_while_a_model_is_built(closed: list[str]) -> None:
    with model._contained(), ThreadPoolExecutor(1) as other:
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert not other.submit(lambda: bool(huggingface_hub.constants.HF_HUB_OFFLINE)).result()
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


COUNTS = {
    "layers": {"model_type": "bert", "num_hidden_layers": 1_000_000},
    "nested layers": {"model_type": "llava", "text_config": TEXT | {"num_hidden_layers": 10**7}},
    "depths": {"model_type": "swin", "depths": [1_000_000, 2]},
    "layers of an older name": {"model_type": "gpt2", "n_layer": 1_000_000},
    "labels": {"model_type": "bert", "num_labels": 1_000_000_000},
    "experts": {"model_type": "mixtral", "num_local_experts": 10**9},
    "a width": {"model_type": "bert", "hidden_size": 10**30},
    "a vocabulary": {"model_type": "bert", "vocab_size": 1 << 70},
}


@pytest.mark.parametrize("config", COUNTS.values(), ids=COUNTS.keys())
def test_absurd_counts_are_refused_in_one_line(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ak.CheckpointError, match="in its config; the limit here is") as error:
        ak.skeleton(tmp_path)
    assert len(str(error.value)) < 500


def test_models_of_several_parts_are_still_built(tmp_path: Path) -> None:
    for number, cls in enumerate((CLIPConfig, LlavaConfig)):
        cls().save_pretrained(tmp_path / str(number))
        assert next(ak.skeleton(tmp_path / str(number)).parameters()).is_meta


def test_what_transformers_logs_of_a_config_is_plain(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT | {"rope_scaling": {"rope_type": "\x1b[2J"}}))
    log, logger = io.StringIO(), transformers.utils.logging.get_logger("transformers")
    handler = logging.StreamHandler(log)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        with model._contained():
            logger.warning("of a file: \x1b[2J")
        with suppress(ak.AdapterError):
            ak.skeleton(tmp_path)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert "of a file: \\x1b[2J" in log.getvalue()
    assert "\x1b" not in log.getvalue()
