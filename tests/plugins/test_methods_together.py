"""LoRA, LoHa and VeRA on one model at once: they add up, keep to their own keys, and leave as they came."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import NAMES, assert_same_outputs, build, inputs, run
from torch import nn

import adapterkit as ak
from adapterkit.forward import arithmetic

METHODS = ("lora", "loha", "vera")
TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj", "wte"],
    "bert": ["query", "value", "word_embeddings"],
    "convnet": ["conv1d", "conv2d", "conv3d", "grouped", "dilated", "circular", "fc"],
    "gemma3": ["q_proj", "embed_tokens"],
}


def add(model: nn.Module, method: str, name: str | None = None, **fields: Any) -> ak.Adapters:
    adapters = ak.attach(model)
    config = ak.config(method, **{"r": 2, "modules_to_save": None, **fields})
    adapters.add(name or method, config, activate=False)
    generator = torch.Generator().manual_seed(len(adapters))
    with torch.no_grad():
        for parameter in adapters.parameters(name or method):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapters


def all_three(name: str) -> tuple[nn.Module, ak.Adapters]:
    model = build(name)
    for method in METHODS:
        adapters = add(model, method, target_modules=TARGETS[name])
    return model, adapters


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_adapts_every_model_and_merges_to_the_same_outputs(method: str, name: str) -> None:
    model = build(name)
    bare = run(model, name)
    targets = TARGETS.get(name, "all-linear")
    adapters = add(model, method, target_modules=targets)
    adapters.activate(method)
    active = run(model, name)
    assert (active - bare).abs().max() > 1e-4
    adapters.merge(method, **({"untie": True} if name in ("gpt2", "gemma3") else {}))
    torch.testing.assert_close(run(model, name), active, rtol=1e-3, atol=1e-4)
    adapters.unmerge()
    adapters.detach()
    assert torch.equal(run(model, name), bare)


@pytest.mark.parametrize("name", TARGETS)
def test_active_together_they_add_up_in_any_order(name: str) -> None:
    model, adapters = all_three(name)
    outputs = []
    for order in itertools.permutations(METHODS):
        adapters.activate(*order)
        outputs.append(run(model, name))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)
    for method in METHODS:
        adapters.activate(*(m for m in METHODS if m != method))
        assert not torch.allclose(run(model, name), outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_each_has_its_own_keys_file_and_gradients(name: str, tmp_path: Path) -> None:
    model, adapters = all_three(name)
    prefixes = {"lora": "lora_", "loha": "hada_", "vera": "vera_"}
    for method in METHODS:
        keys = adapters.state_dict(method)
        assert keys
        assert all(f".{prefixes[method]}" in key for key in keys)
        adapters.save(method, tmp_path / method)
    adapters.activate(*METHODS)
    out = model(**inputs(name))
    (out if isinstance(out, torch.Tensor) else out.logits).square().sum().backward()
    trained = {k for k, p in model.named_parameters() if p.grad is not None}
    assert trained == {k for k, p in model.named_parameters() if ".adapters." in k}
    expected = run(model, name)
    again = build(name)
    for method in METHODS:
        ak.attach(again).load(tmp_path / method, method)
    ak.attach(again).activate(*METHODS)
    torch.testing.assert_close(run(again, name), expected)


@pytest.mark.parametrize(
    ("method", "name"),
    [*(("lora", name) for name in ("query", "model", "keys", "adapters")), ("vera", "vera_A"), ("loha", "hada_w1_a")],
)
def test_names_that_collide_with_keys_lose_nothing(method: str, name: str, tmp_path: Path) -> None:
    model = build("bert")
    adapters = add(model, method, name, target_modules=["query"])
    add(model, method, "other", target_modules=["query"])
    adapters.activate(name)
    expected = run(model, "bert")
    assert adapters.save(name, tmp_path).exists()
    again = build("bert")
    report = ak.attach(again).load(tmp_path, name)
    assert report.ok
    assert_same_outputs(run(again, "bert"), expected)
    full = build("bert")
    add(full, method, name, target_modules=["query"])
    assert ak.attach(full).load_state_dict(name, model.state_dict()).ok
    ak.attach(full).activate(name)
    assert_same_outputs(run(full, "bert"), expected)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_in_one_piece_it_gives_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # its limit of compilations counts those of other tests
    monkeypatch.setattr(arithmetic, "REBUILT", 0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(3, 4, 3))
    adapters = add(model, method, target_modules=["0", "1"])
    adapters.activate(method)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, found = (
        torch.autograd.grad(m(x).square().sum(), list(adapters.parameters(method))) for m in (model, compiled)
    )
    torch.testing.assert_close(compiled(x), model(x))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
