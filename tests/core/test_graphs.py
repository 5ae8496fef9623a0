"""What acts belongs to the forward and its graph: the backward, and what it computes again, know of no later switch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from tests.core.conftest import set_parameters
from tests.models import build, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak

FORMS = {"no": None, "checkpointing": False, "re-entrant checkpointing": True}
Gradients = dict[str, list[Tensor | None]]


class Blocks(nn.Module):
    """Three blocks, which call torch's checkpointing by themselves."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def with_blocks(reentrant: bool | None) -> tuple[ak.Adapters, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Blocks(reentrant)
    x = torch.randn(2, 6)
    return adapted(model, r"blocks\.\d\.0"), lambda: model(x).square().sum()


def with_transformers(reentrant: bool | None) -> tuple[ak.Adapters, Callable[[], Tensor]]:
    model: Any = build("llama")
    if reentrant is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
    return adapted(model, ["q_proj", "down_proj"]), lambda: model(**inputs("llama")).logits.square().mean()


def adapted(model: nn.Module, targets: Any) -> ak.Adapters:
    adapters = ak.attach(model)
    torch.manual_seed(0)
    for seed, name in enumerate("ab"):
        adapters.add(name, ak.config("lora", r=2, target_modules=targets), activate=False)
        set_parameters(adapters, name, seed=seed)
    return adapters


def gradients(adapters: ak.Adapters) -> Gradients:
    return {name: [p.grad for p in adapters.parameters(name)] for name in adapters.names}


CASES = {
    "both": "ab",
    "switched": "a",
    "behind a block": "a",
    "in another block": "a",
    "in another thread": "a",
    "beside constants": "a",
    "then as constants": "a",
    "renamed": "a",
}


def play(case: str, adapters: ak.Adapters, loss: Callable[[], Tensor]) -> None:
    """A loss of `a`, whatever of this case comes before its backward, and the backward."""
    adapters.activate("b" if case == "behind a block" else "a")
    with adapters.activated("a") if case in ("behind a block", "in another thread") else nullcontext():
        total = loss()
    if case in ("both", "switched"):
        adapters.activate("b")
    if case == "then as constants":
        adapters.activate("a", trainable=False)
    if case == "renamed":
        adapters.rename("a", "z")
        adapters.rename("b", "a")
    with adapters.activated("a", trainable=False) if case == "beside constants" else nullcontext():
        total = total + loss() if case in ("both", "then as constants", "beside constants") else total
    with adapters.disabled() if case == "in another block" else nullcontext():
        if case == "in another thread":
            thread = threading.Thread(target=total.backward)
            thread.start()
            thread.join()
        else:
            total.backward()
    if case == "renamed":
        adapters.rename("a", "b")
        adapters.rename("z", "a")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [with_blocks, with_transformers])
def test_gradients_go_to_the_adapters_of_the_forward(make: Callable[..., Any], case: str, form: str) -> None:
    expected: Gradients = {"a": [], "b": []}
    for name in CASES[case]:
        adapters, loss = make(None)
        adapters.activate(name)
        loss().backward()
        expected[name] = gradients(adapters)[name]
    adapters, loss = make(FORMS[form])
    play(case, adapters, loss)
    found = gradients(adapters)
    for name, wanted in expected.items():
        for grad, other in zip(found[name], wanted or [None] * len(found[name]), strict=True):
            assert (grad is None) == (other is None)
            if grad is not None:
                torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [with_blocks, with_transformers])
def test_rows_get_their_gradients_behind_the_block(make: Callable[..., Any], form: str) -> None:
    found = []
    for reentrant, inside in ((None, True), (FORMS[form], False)):
        adapters, loss = make(reentrant)
        with adapters.per_sample(["a", "b"], trainable=True):
            first = loss()
            if inside:
                first.backward()
        if not inside:
            first.backward()
        found.append([grad for grads in gradients(adapters).values() for grad in grads])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("change", ["remove", "merge"])
def test_what_cannot_be_computed_again_is_refused(change: str, reentrant: bool) -> None:
    adapters, loss = with_blocks(reentrant)
    adapters.activate("a")
    first = loss()
    getattr(adapters, change)("a")
    with pytest.raises(ak.StateError, match="recomputes a forward"):
        first.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_another_models_merge_is_of_no_concern(reentrant: bool) -> None:
    (adapters, loss), (others, _) = with_blocks(reentrant), with_blocks(None)
    adapters.activate("a")
    first = loss()
    others.merge("a")
    first.backward()
    assert all(p.grad is not None for p in adapters.parameters("a"))


def test_merged_and_unmerged_again_it_is_computed_as_before() -> None:
    adapters, loss = with_blocks(True)
    adapters.activate("a")
    loss().backward()
    expected = [p.grad for p in adapters.parameters("a")]
    adapters.model.zero_grad()
    first = loss()
    adapters.merge("b")
    adapters.unmerge()
    first.backward()
    torch.testing.assert_close([p.grad for p in adapters.parameters("a")], expected)


# Encoders that are not fed tokens


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    config = transformers.WhisperConfig(d_model=16, dropout=0.0, **sizes, **heads, **tokens, **lengths)
    given = {"input_features": torch.randn(2, 8, 20), "labels": torch.full((2, 5), 7)}
    return transformers.WhisperForConditionalGeneration(config), given


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    return build("vit"), {**inputs("vit"), "labels": torch.zeros(len(inputs("vit")["pixel_values"]), dtype=torch.long)}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    return build("t5"), {"input_ids": torch.arange(1, 13).view(2, 6), "labels": torch.full((2, 5), 7)}


@pytest.mark.parametrize("make", [whisper, vit, t5])
def test_reentrant_checkpointing_gives_gradients_where_no_input_requires_one(make: Callable[..., Any]) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, given = make()
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
        adapters = ak.attach(model.train())
        for module in model.modules():
            for field in ("p", "dropout", "dropout_rate"):  # attention and T5 keep probabilities of their own
                if isinstance(getattr(module, field, None), float):
                    setattr(module, field, 0.0)
        adapters.add("a", ak.config("lora", r=2, target_modules="all-linear", modules_to_save=None))
        set_parameters(adapters, "a")
        model(**given).loss.backward()
        found.append({key: p.grad for key, p in adapters.named_parameters("a")})
    assert any(grad is not None and grad.any() for grad in found[0].values())
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("trainable", [False, True])
def test_parameters_of_one_call_get_their_gradients_in_every_block(trainable: bool) -> None:
    adapters, loss = with_blocks(None)
    adapters.activate("a")
    loss().backward()
    model, x = adapters.model, torch.ones(2, 6)
    given = {name: p.detach() for name, p in model.named_parameters() if ".adapters.a." in name}

    def square(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = torch.func.grad(square)(given)
    with adapters.activated("a", trainable=trainable):
        torch.testing.assert_close(torch.func.grad(square)(given), expected)
    assert all(grad.any() for grad in expected.values())


# Flags


def flags(adapters: ak.Adapters, name: str) -> set[bool]:
    return {p.requires_grad for p in adapters.parameters(name)}


def test_what_a_graph_holds_is_frozen_at_the_first_switch_after_it() -> None:
    adapters, loss = with_blocks(None)
    adapters.activate("a")
    first = loss()
    adapters.activate("b")
    assert flags(adapters, "a") == {True}
    del first
    with adapters.disabled():
        pass
    assert flags(adapters, "a") == {False}
    assert flags(adapters, "b") == {True}


def test_a_block_takes_no_requires_grad_from_others_and_gives_its_own_back() -> None:
    adapters, loss = with_blocks(None)
    adapters.activate("a")
    with adapters.activated("b"):
        assert flags(adapters, "a") == flags(adapters, "b") == {True}
        loss().backward()
    assert flags(adapters, "a") == {True}
    assert flags(adapters, "b") == {False}


def test_what_the_user_set_stays_through_a_block() -> None:
    adapters, _ = with_blocks(None)
    next(adapters.parameters("b")).requires_grad_(True)
    with adapters.activated("b"), adapters.activated("a", trainable=False):
        pass
    assert [p.requires_grad for p in adapters.parameters("b")] == [True] + [False] * 5


def test_activate_asks_the_parameters_themselves() -> None:
    adapters, _ = with_blocks(None)
    adapters.activate("a")
    adapters.model.requires_grad_(False)
    assert [row.trainable for row in adapters.status().rows] == [False, False]
    adapters.activate("a")
    assert flags(adapters, "a") == {True}
    adapters.model.requires_grad_(True)
    adapters.activate("a", trainable=False)
    assert flags(adapters, "a") == flags(adapters, "b") == {False}


def test_status_says_how_many_numbers_train() -> None:
    adapters, _ = with_blocks(None)
    adapters.activate("a")
    next(adapters.parameters("a")).requires_grad_(False)
    row = adapters.status().rows[0]
    assert (row.trainable, row.trainable_parameters, row.parameters) == (True, 60, 72)
    assert "  60  " in str(adapters.status())


@pytest.mark.parametrize("partly", [False, True])
def test_an_adapter_trains_again_after_unmerge(partly: bool) -> None:
    adapters, loss = with_blocks(None)
    adapters.activate("a")
    next(adapters.parameters("a")).requires_grad_(not partly)
    before = [p.requires_grad for p in adapters.parameters("a")]
    adapters.merge("a")
    assert flags(adapters, "a") == {False}
    adapters.unmerge()
    assert [p.requires_grad for p in adapters.parameters("a")] == before
    loss().backward()
    with adapters.disabled():
        pass
    assert [p.grad is not None for p in adapters.parameters("a")] == before
    adapters.activate("a", trainable=False)
    adapters.merge("a")
    adapters.unmerge()
    assert flags(adapters, "a") == {False}


def test_merging_in_a_block_holds_behind_it() -> None:
    adapters, loss = with_blocks(None)
    adapters.activate("a")
    expected = loss()
    with adapters.activated("b"):
        adapters.merge("a")
    assert adapters.active == ()
    torch.testing.assert_close(loss(), expected)
    adapters.unmerge()
    assert adapters.active == ("a",)
    assert flags(adapters, "a") == {True}
    torch.testing.assert_close(loss(), expected)


def test_a_loaded_adapter_that_is_to_train_and_not_to_act_does_so_in_blocks(tmp_path: Any) -> None:
    adapters, loss = with_blocks(None)
    adapters.activate("b")
    adapters.save("a", tmp_path)
    adapters.load(tmp_path, "c", activate=False, trainable=True)
    assert adapters.active == ("b",)
    assert flags(adapters, "b") == flags(adapters, "c") == {True}
    with adapters.activated("c"):
        loss().backward()
    assert flags(adapters, "c") == {True}
    assert all(p.grad is not None for p in adapters.parameters("c"))
    adapters.activate("b")
    assert flags(adapters, "c") == {False}
