"""LoKr files of LyCORIS load through the foreign package's hooks, with the outputs of LyCORIS's own forward."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.diffusion import loaded, lycoris_file, output, read, text_encoder, unet, write
from tests.thirdparty.environment import PACKAGES

import adapterkit as ak

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "factor": {"factor": 2},
    "both": {"decompose_both": True, "linear_dim": 1},
    "conv": {"conv_dim": 2, "conv_alpha": 5},
    "tucker": {"use_tucker": True, "linear_dim": 1, "conv_dim": 1},
    "whole": {"full_matrix": True},
    "scalar": {"use_scalar": True},
    "rs": {"rs_lora": True},
}
MODELS = {"unet": unet, "clip": text_encoder}


@pytest.fixture(scope="module", autouse=True)
def method() -> Iterator[None]:
    """LoKr, registered as from a notebook."""
    sys.path.insert(0, str(PACKAGES["lokr"]))
    ak.register(importlib.import_module("adapterkit_lokr.plugin"))
    yield
    ak.default_registry.unregister("lokr")
    sys.path.remove(str(PACKAGES["lokr"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_lycoris_gives_its_outputs(name: str, options: str, tmp_path: Path) -> None:
    model = MODELS[name]().double()
    file = tmp_path / "lokr.safetensors"
    wanted = lycoris_file(model, file, algo="lokr", **OPTIONS[options])
    base = output(model)
    assert (wanted - base).abs().max() > 1e-3
    with loaded(model, file, dtype="file") as report:
        assert report.ok
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-6 if options == "rs" else 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", ["dora_scale", "lokr_t1"])
def test_what_is_no_plain_kronecker_product_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    file = tmp_path / "lokr.safetensors"
    lycoris_file(unet(), file, algo="lokr")
    tensors = read(file)
    module = next(iter(tensors)).rpartition(".")[0]
    write(file, {**tensors, f"{module}.{key}": torch.ones(2, 2)})
    with pytest.raises(ak.UnsupportedError, match=rf"{module}\.{key}"):
        ak.attach(unet()).load(file, "x")
