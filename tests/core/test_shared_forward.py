"""Adapters that have a part in the model's call (`Shared.forward`): a router of experts, and trained prompts."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from tests.models import VOCABULARY, assert_same_outputs, build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.testing import check_peft, run_checks

EXPERTS, RANK, PROMPTS, WIDTH = 3, 2, 4, 16


@dataclass(frozen=True, kw_only=True)
class RouterConfig(ak.AdapterConfig):
    """LoRA experts, mixed for each row of the batch by a vote of its words."""

    method = "router"

    experts: int = EXPERTS


class Router(ak.Shared):
    def setup(self, targets: Sequence[ak.Target], config: RouterConfig, root: ak.Target) -> None:
        self.router_votes = root.new(VOCABULARY, config.experts, init=nn.init.normal_)
        self.shares: Any = None

    def forward(self, base: Any, input_ids: Tensor, expert: Any = None, **kwargs: Any) -> Any:
        self.shares = self.router_votes[input_ids].mean(1).softmax(-1)
        if expert is not None:
            self.shares = nn.functional.one_hot(expert, EXPERTS).to(self.shares.dtype)
        return base(input_ids, **kwargs)

    def penalty(self, layers: Mapping[str, ak.AdapterLayer]) -> Tensor:
        found: Tensor = EXPERTS * self.shares.mean(0).square().sum()
        return found


class RouterLayer(ak.AdapterLayer):
    def setup(self, target: ak.Target, config: RouterConfig) -> None:
        self.router_down = target.new(config.experts, RANK, target.in_features, init=nn.init.normal_)
        self.router_up = target.new(config.experts, target.out_features, RANK)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        hidden = torch.einsum("bti,eri->bter", x, self.router_down)
        out: Tensor = base(x) + torch.einsum("be,bter,eor->bto", self.shared.shares, hidden, self.router_up)
        return out


class PromptConfig(ak.AdapterConfig):
    """Trained embeddings before those of the input."""

    method = "prompt"


class Prompt(ak.Shared):
    def setup(self, targets: Sequence[ak.Target], config: PromptConfig, root: ak.Target) -> None:
        self.prompt_vectors = root.new(PROMPTS, WIDTH, init=nn.init.normal_)

    def forward(self, base: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        words = base.module.get_input_embeddings()(input_ids)
        prompts = self.prompt_vectors.to(words.dtype).expand(len(words), -1, -1)
        out = base(inputs_embeds=torch.cat([prompts, words], 1), **kwargs)
        out.logits = out.logits[:, PROMPTS:]
        return out


class PromptPlugin(ak.Plugin):
    config, shared, prefix = PromptConfig, Prompt, "prompt_"

    def targets(self, model: nn.Module, config: Any) -> list[str]:
        return []


class ScaledConfig(ak.AdapterConfig):
    """A LoRA of rank 2 whose middle the model's call gives."""

    method = "scaled"


class Scale(ak.Shared):
    def setup(self, targets: Sequence[ak.Target], config: ScaledConfig, root: ak.Target) -> None:
        self.scaled_by = root.new(RANK, init=nn.init.normal_)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        self.scale = self.scaled_by.sigmoid()
        return base(*args, **kwargs)


class ScaledLayer(ak.LowRankLayer):
    def setup(self, target: ak.Target, config: ScaledConfig) -> None:
        self.scaled_up = target.new(target.out_features, RANK)
        self.scaled_down = target.new(RANK, target.in_features, init=nn.init.normal_)

    def factors(self) -> ak.Factors:
        return ak.Factors(self.scaled_up, self.scaled_down, mid=self.shared.scale)


@pytest.fixture(autouse=True)
def registered() -> None:
    ak.register(ak.plugin(RouterConfig, RouterLayer, prefix="router_", shared=Router))
    ak.register(PromptPlugin())
    ak.register(ak.plugin(ScaledConfig, ScaledLayer, prefix="scaled_", shared=Scale))


every = pytest.mark.parametrize("method", ["router", "prompt"])


def config(method: str) -> ak.AdapterConfig:
    targets = {} if method == "prompt" else {"target_modules": ["q_proj", "down_proj"]}
    return ak.config(method, **targets)


def trained(method: str) -> tuple[Any, ak.Adapters]:
    """A tiny Llama with the adapter `a` of this method, after three steps."""
    model: Any = build("llama")
    adapters = ak.attach(model)
    torch.manual_seed(1)
    adapters.add("a", config(method))
    optimizer = torch.optim.AdamW(adapters.parameters("a"), lr=0.1)
    before = {name: p.detach().clone() for name, p in adapters.named_parameters("a")}
    for _ in range(3):
        (model(**inputs("llama")).logits.square().mean() + ak.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in adapters.named_parameters("a"))
    return model, adapters


@every
def test_it_trains_and_a_file_gives_it_back(method: str, tmp_path: Path) -> None:
    model, adapters = trained(method)
    out = run(model, "llama")
    assert (out - run(build("llama"), "llama")).abs().max() > 1e-2
    adapters.save("a", tmp_path / "one")
    fresh: Any = build("llama")
    report = ak.attach(fresh).load(tmp_path / "one", "b")
    assert not {*report.missing, *report.unexpected, *report.mismatched}
    assert_same_outputs(run(fresh, "llama"), out)
    # The model's own way of saving, too.
    model.save_pretrained(tmp_path / "two")
    again = build("llama")
    ak.attach(again).load(tmp_path / "two", "c")
    assert_same_outputs(run(again, "llama"), out)


@every
def test_where_it_does_not_act_the_call_is_what_it_was(method: str) -> None:
    bare = build("llama")
    expected, call, signature = run(bare, "llama"), type(bare).forward, inspect.signature(bare.forward)
    model, adapters = trained(method)
    with adapters.disabled():
        assert torch.equal(run(model, "llama"), expected)
    adapters.add("b", ak.config("lora", target_modules=["v_proj"]))
    assert torch.equal(run(model, "llama"), expected)
    adapters.activate("a")
    adapters.remove("a")
    assert type(model).forward is call
    assert inspect.signature(model.forward) == signature
    assert torch.equal(run(model, "llama"), expected)
    adapters.add("a", config(method))
    adapters.detach()
    assert type(model) is type(bare)
    assert "adapter_shared" not in model._modules
    assert torch.equal(run(model, "llama"), expected)


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_have_it_without_what_a_forward_left(method: str, copied: Any) -> None:
    model, adapters = trained(method)
    out = run(model, "llama")
    model(**inputs("llama"))  # leaves a tensor with a graph
    again = copied(model)
    if method == "router":
        assert model.adapter_shared["a"].shares is not None
        assert again.adapter_shared["a"].shares is None
    assert_same_outputs(run(again, "llama"), out)
    assert inspect.signature(again.forward) == inspect.signature(model.forward)
    adapters.copy("a", "twin")
    adapters.rename("a", "first")
    adapters.remove("first")
    adapters.activate("twin")
    assert_same_outputs(run(model, "llama"), out)


def test_the_signature_is_the_models_own_with_the_keywords() -> None:
    model, adapters = trained("router")
    own = inspect.signature(build("llama").forward).parameters
    now = inspect.signature(model.forward).parameters
    assert [name for name in now if name != "expert"] == [*own]
    plain = build("llama")
    ak.attach(plain).add("a", config("scaled"))  # its call has no keywords
    assert [*inspect.signature(plain.forward).parameters] == [*own]
    given = inputs("llama") | {"expert": torch.tensor([0, 2])}
    one = model(**given).logits
    assert not torch.allclose(one, model(**inputs("llama")).logits)
    # `generate` refuses keywords that the signature lacks; without a cache each call gets the whole text.
    model.generate(**given, max_new_tokens=2, use_cache=False, do_sample=False, pad_token_id=0)
    adapters.activate()
    adapters.remove("a")
    with pytest.raises(ValueError, match="expert"):
        model.generate(**given, max_new_tokens=2)


def test_on_an_offloaded_model(tmp_path: Path) -> None:
    model, adapters = trained("router")
    adapters.save("a", tmp_path)
    offloaded = build("llama")
    accelerate.cpu_offload(offloaded, torch.device("cpu"))
    signature, bare = inspect.signature(offloaded.forward), run(offloaded, "llama")
    ak.attach(offloaded).load(tmp_path, "a")
    assert_same_outputs(run(offloaded, "llama"), run(model, "llama"))
    assert inspect.signature(offloaded.forward) == inspect.signature(model.forward)
    ak.attach(offloaded).remove("a")
    assert inspect.signature(offloaded.forward) == signature
    assert torch.equal(run(offloaded, "llama"), bare)


def test_compiled_as_one_graph() -> None:
    model, adapters = trained("router")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert_same_outputs(run(compiled, "llama"), run(model, "llama"))
    with adapters.disabled():
        assert_same_outputs(run(compiled, "llama"), run(build("llama"), "llama"))


def test_two_threads_at_once_are_refused() -> None:
    model, _ = trained("router")
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(10)

    handle = model.model.register_forward_pre_hook(wait)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run, model, "llama")
        assert inside.wait(10)
        with pytest.raises(ak.StateError, match="one forward at a time"):
            run(model, "llama")
        go_on.set()
        out = running.result()
    handle.remove()
    assert_same_outputs(run(model, "llama"), out)
    with pytest.raises(ak.StateError, match="in place of DataParallel"):
        run(model._replicate_for_data_parallel(), "llama")


def test_the_kit_checks_such_a_method() -> None:
    results = run_checks(ScaledConfig())
    assert [name for name, result in results.items() if result.startswith("failed")] == []
    assert "cannot be merged" in results["check_merged_equals_adapted"]
    assert results["check_two_adapters_of_one_method"] == "passed"


@every
def test_it_is_refused_where_no_weight_and_no_row_stands_for_it(method: str, tmp_path: Path) -> None:
    model, adapters = trained(method)
    adapters.add("b", ak.config("lora", target_modules=["q_proj"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "Router" if method == "router" else "Prompt"
    with pytest.raises(ak.UnsupportedError, match=f"'a' cannot be merged: {name}.forward is the model's call"):
        adapters.merge("b", "a")
    with pytest.raises(ak.UnsupportedError, match=f"'a' cannot act in per_sample: {name}.forward"):
        adapters.per_sample(["a", "b"]).__enter__()
    with pytest.raises(ak.UnsupportedError, match="cannot be combined"):
        adapters.combine("c", {"a": 1.0})
    assert adapters.merged == ()
    assert adapters.names == ("a", "b")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    adapters.save("a", tmp_path / "a")
    build("llama").save_pretrained(tmp_path / "base")
    base, file, out = tmp_path / "base", tmp_path / "a", tmp_path / "out"
    with pytest.raises(ak.UnsupportedError, match="cannot be merged"):
        ak.merge_checkpoint(base, [file], out)
    with pytest.raises(ak.UnsupportedError, match="cannot be combined or converted"):
        ak.combine_files({file: 1.0}, out, base=base)
    with pytest.raises(ak.UnsupportedError, match="cannot be combined or converted"):
        ak.convert_file(file, out, to="lora", base=base)
    assert not out.exists()


@pytest.mark.parametrize("method", ["router", "prompt", "scaled"])
def test_reports_say_that_it_cannot_be_measured(method: str, tmp_path: Path) -> None:
    adapters = ak.attach(build("llama"))
    adapters.add("a", config(method))
    assert "Its changes cannot be measured" in str(adapters.report())
    adapters.save("a", tmp_path)
    assert f"{method}_" in str(ak.inspect_adapter(tmp_path))
    described = next(row for row in ak.describe_methods().methods if row.name == method)
    assert not described.merges
    assert not described.combines


def test_two_on_one_model_the_first_active_is_innermost() -> None:
    model, adapters = trained("router")
    adapters.add("p", PromptConfig())
    alone, shared = run(model, "llama"), model.adapter_shared["a"]
    adapters.add("q", PromptConfig())
    calls: list[str] = []
    for name in ("a", "p"):
        model.adapter_shared[name].register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    # The router needs the words, so it comes before the prompts.
    adapters.activate("p", "a")
    both = run(model, "llama")
    assert calls == ["a", "p"]
    assert not torch.allclose(both, alone)
    assert shared.shares.shape == (2, EXPERTS)
    adapters.activate("p")
    assert torch.equal(run(model, "llama"), alone)
    adapters.remove("a")
    assert torch.equal(run(model, "llama"), alone)
    assert "expert" not in inspect.signature(model.forward).parameters


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(ak.AdapterConfig):
    method = "prompt_tuning"
    not_implemented = dict.fromkeys(
        ("prompt_tuning_init", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"), ...
    )

    num_virtual_tokens: int = PROMPTS


class PeftsPrompt(ak.Shared):
    def setup(self, targets: Sequence[ak.Target], config: PromptTuningConfig, root: ak.Target) -> None:
        self.prompt_embeddings = root.new(config.num_virtual_tokens, WIDTH, init=nn.init.normal_)

    def forward(self, base: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        words = base.module.get_input_embeddings()(input_ids)
        return base(inputs_embeds=torch.cat([self.prompt_embeddings.expand(len(words), -1, -1), words], 1), **kwargs)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning:peft")  # fields of every config here
def test_prompts_have_pefts_files() -> None:
    ak.register(type("P", (PromptPlugin,), {"config": PromptTuningConfig, "shared": PeftsPrompt})())
    theirs = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPTS)
    check_peft(PromptTuningConfig(), theirs, model=partial(build, "llama"), inputs=inputs("llama"))


@every
def test_as_a_constant_it_gets_no_gradient(method: str) -> None:
    model, adapters = trained(method)
    for parameter in adapters.parameters("a"):
        parameter.requires_grad_(True)
    adapters.add("b", ak.config("lora", target_modules=["q_proj"]))
    out = model(**inputs("llama")).logits.sum()
    with adapters.activated("a", trainable=False):
        assert all(p.requires_grad_(True).grad is None for p in adapters.parameters("a"))
        out = out + model(**inputs("llama")).logits.sum()
    out.backward()
    assert all(p.grad is None for p in adapters.parameters("a"))
    assert any(p.grad is not None for p in adapters.parameters("b"))


def test_checkpointing_computes_again_with_what_each_forward_left() -> None:
    model, adapters = trained("router")
    first, other = inputs("llama")["input_ids"], inputs("llama")["input_ids"].flip(1) // 2

    def gradients() -> list[Tensor]:
        (model(first).logits.square().mean() - model(other).logits.square().mean()).backward()
        found = [p.grad.clone() for p in adapters.parameters("a") if p.grad is not None]
        model.zero_grad()
        return found

    model.train()
    expected = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for found, wanted in zip(gradients(), expected, strict=True):
        assert_same_outputs(found, wanted)
