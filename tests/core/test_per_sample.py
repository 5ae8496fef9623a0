"""A different adapter for each row of a batch: equal to each row by itself, and refused where that is not certain."""

from __future__ import annotations

import copy
import pickle
import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.combining import outer_method, scaling_method
from tests.core.conftest import assert_as_before, set_parameters, snapshot
from tests.models import LABELS, NAMES, build, inputs
from torch import Tensor, nn

import adapterkit as ak

METHODS = ("lora", "loha", "vera", "outer", "scale")
TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj", "wte"],
    "llama": ["q_proj", "down_proj", "lm_head"],
    "bert": ["query", "intermediate.dense", "word_embeddings", "classifier"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "projection"],
    "gemma3": ["q_proj", "embed_tokens"],
    "bart": ["q_proj", "fc2", "encoder.embed_tokens"],
    "convnet": ["conv1d", "conv2d", "conv3d", "grouped", "dilated", "circular", "fc"],
    "embednet": ["layers.0", "overhead", "embed"],
}
# Rows as many as places in each: see the refusals.
AMBIGUOUS = (4, 6)
Names = Sequence[str | None]


@pytest.fixture(autouse=True)
def registered() -> None:
    for plugin in (outer_method(), scaling_method(mergeable=True)):
        ak.register(plugin)


def adapted(name: str, methods: Sequence[str], **fields: Any) -> ak.Adapters:
    """`name` in float64 with an adapter `a`, `b`, ... of each of these methods."""
    adapters = ak.attach(build(name).double())
    for i, method in enumerate(methods):
        sizes = {} if method in ("outer", "scale") else {"r": 2 + i % 2}
        config = ak.config(method, **{"target_modules": TARGETS[name], "modules_to_save": None, **sizes, **fields})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(i)
            adapters.add("abcdefgh"[i], config, activate=False)
        set_parameters(adapters, "abcdefgh"[i], seed=i)
    return adapters


def two(model: nn.Module, *targets: str) -> ak.Adapters:
    """`model` in float64 with the adapters `a` and `b`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapters = ak.attach(model.double().eval())
        for name in ("a", "b"):
            config = ak.config("lora", r=2, target_modules=list(targets), modules_to_save=None)
            adapters.add(name, config, activate=False)
            set_parameters(adapters, name, seed=ord(name))
    return adapters


def batch(name: str, count: int) -> dict[str, Tensor]:
    """Inputs of `count` different rows."""
    found = {}
    for key, value in inputs(name).items():
        rows = [
            (value[0] * (i + 3) % 29 + 1) if value.dtype == torch.long else value[0] * (1 + i / 3) for i in range(count)
        ]
        found[key] = torch.stack(rows) if value.dtype == torch.long else torch.stack(rows).double()
    return found


def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    out = model(**given)
    return out if isinstance(out, Tensor) else out.logits


def alone(adapters: ak.Adapters, names: Names, given: dict[str, Tensor]) -> Tensor:
    """The slow literal form: each row by itself, with its adapter."""
    outs = []
    for i, name in enumerate(names):
        with adapters.activated(*([] if name is None else [name]), trainable=False):
            outs.append(output(adapters.model, {key: value[i : i + 1] for key, value in given.items()}))
    return torch.cat(outs)


def check(adapters: ak.Adapters, names: Names, given: dict[str, Tensor], **tolerance: float) -> Tensor:
    with torch.no_grad():
        with adapters.per_sample(names):
            found = output(adapters.model, given)
        expected = alone(adapters, names, given)
    torch.testing.assert_close(found, expected, **tolerance)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_each_row_is_what_it_is_by_itself(method: str, name: str) -> None:
    adapters = adapted(name, [method] * 3)
    given = batch(name, 5)
    found = check(adapters, ["b", None, "a", "b", "c"], given)
    with adapters.disabled(), torch.no_grad():
        bare = output(adapters.model, given)
    changed = (found - bare).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [True, False, True, True, True]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_methods_and_ranks_in_any_order(data: st.DataObject) -> None:
    methods = data.draw(st.lists(st.sampled_from(METHODS), min_size=1, max_size=4))
    name = data.draw(st.sampled_from(["bert", "embednet", "convnet"]))
    adapters = adapted(name, methods)
    names = data.draw(
        st.lists(st.sampled_from([None, *adapters.names]), min_size=1, max_size=9).filter(
            lambda n: len(n) not in AMBIGUOUS
        )
    )
    check(adapters, names, batch(name, len(names)))


@pytest.mark.parametrize("rows", [3, 19])
@pytest.mark.parametrize("method", ["lora", "loha", "vera"])
def test_float32_differs_by_rounding_alone(method: str, rows: int) -> None:
    adapters = adapted("bert", [method] * 2)
    adapters.model.float()
    names = ["a", None, "b", "a", "a", "b", "a", None, "b", "a", "a", "b", "b", *"aabbaa"][:rows]
    check(adapters, names, batch("bert", rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_has_the_dtype_that_it_has_without_rows(autocast: bool) -> None:
    adapters = adapted("bert", ["lora", "loha", "vera"], **({} if autocast else {"bias": "all"}))
    adapters.model.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = check(adapters, ["a", "b", None, "c"], batch("bert", 4), rtol=0.1, atol=0.1)
    assert found.dtype == torch.bfloat16


# Generation


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_beams_and_a_cache_is_that_of_each_row(name: str, beams: int) -> None:
    adapters = adapted(name, ["lora", "loha", "vera"])
    names = ["c", "a", None, "b", "a"]
    ids = batch(name, 5)["input_ids"]
    options: dict[str, Any] = {"num_beams": beams, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None, "length_penalty": 0.0}

    def generate(rows: Tensor) -> Any:
        return adapters.model.generate(rows, attention_mask=torch.ones_like(rows), **options)

    with adapters.per_sample(names):
        found = generate(ids)
    expected = []
    for row, own in zip(ids, names, strict=True):
        with adapters.activated(*([own] if own else []), trainable=False):
            expected.append(generate(row[None]).sequences)
    assert torch.equal(found.sequences, torch.cat(expected))
    with adapters.disabled():
        assert not torch.equal(found.sequences, generate(ids).sequences)


# Heads, biases, label sets


def with_heads(**sizes: int) -> ak.Adapters:
    """BERT with adapters whose heads have as many labels as said; 0: no head."""
    adapters = ak.attach(build("bert").double())
    for i, (name, labels) in enumerate(sizes.items()):
        config = ak.config("lora", r=2, target_modules=["query"], modules_to_save="auto" if labels else None)
        adapters.add(name, config, num_labels=labels or None, activate=False)
        set_parameters(adapters, name, seed=i)
    return adapters


@pytest.mark.parametrize("names", [["a", "b", "a"], ["b", None, "a", "n"], ["n", "a", None, "n", None]])
def test_a_row_has_the_head_of_its_adapter(names: Names) -> None:
    adapters = with_heads(a=LABELS, b=LABELS, n=0)
    check(adapters, names, batch("bert", len(names)))


def test_adapters_inside_a_module_that_is_another_s_head_act_on_their_own_rows() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)))

    adapters = two(Net(), "head.0", "head.2")
    adapters.add("h", ak.config("lora", r=2, target_modules=["body"], modules_to_save=["head"]), activate=False)
    set_parameters(adapters, "h")
    x = torch.randn(7, 4).double()
    for names in (["h", "a", "b", None, "h", "a", "b"], ["h", *"aaahaa"], ["h", *[None] * 6]):
        check(adapters, names, {"x": x})


def test_heads_of_the_same_size_set_the_model_s_labels() -> None:
    adapters = with_heads(a=5, b=5)
    with adapters.per_sample(["a", "b", "a"]):
        assert adapters.model.config.num_labels == 5
        assert adapters.model(**batch("bert", 3), labels=torch.tensor([0, 4, 1])).loss.isfinite()
    assert adapters.model.config.num_labels == LABELS


def test_heads_of_different_shapes_are_refused() -> None:
    adapters = with_heads(a=LABELS, b=5)
    message = (
        r"The heads of these rows give outputs of different shapes, \(3,\) for rows of 'a', \(5,\) for rows of 'b', "
    )
    with pytest.raises(ak.ConfigError, match=message + "which cannot be one batch"), adapters.per_sample(["a", "b"]):
        adapters.model(**batch("bert", 2))
    message = r"\(5,\) for rows of 'b', \(3,\) for rows of the others"
    with pytest.raises(ak.ConfigError, match=message), adapters.per_sample([None, "b"]):
        adapters.model(**batch("bert", 2))
    assert adapters.active == ()


@pytest.mark.parametrize("name", ["bert", "convnet"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_go_with_their_rows(name: str, bias: str) -> None:
    adapters = adapted(name, ["lora", "lora"], bias=bias)
    adapters.add("s", ak.config("scale", target_modules=TARGETS[name]), activate=False)
    set_parameters(adapters, "s")
    check(adapters, ["b", None, "a", "a", None], batch(name, 5))
    check(adapters, ["b", None, "a", "s", None], batch(name, 5))


# Training


@pytest.mark.parametrize("names", ["abcdecbaa", "bbbbbbbbbbbbbbbbba"])
@pytest.mark.parametrize("name", ["bert", "convnet"])
def test_gradients_are_the_sums_of_the_rows_own(name: str, names: str) -> None:
    adapters = adapted(name, METHODS)
    given = batch(name, len(names))
    with adapters.per_sample(list(names), trainable=True):
        assert all(p.requires_grad for p in adapters.parameters("b"))
        output(adapters.model, given).square().sum().backward()
    assert not any(p.requires_grad for own in adapters.names for p in adapters.parameters(own))
    found = {}
    for own in set(names):
        for key, parameter in adapters.named_parameters(own):
            found[own, key], parameter.grad = parameter.grad, None
    for i, own in enumerate(names):
        with adapters.activated(own):
            output(adapters.model, {k: v[i : i + 1] for k, v in given.items()}).square().sum().backward()
    for (own, key), grad in found.items():
        torch.testing.assert_close(grad, dict(adapters.named_parameters(own))[key].grad)


def test_a_dropout_acts_in_training() -> None:
    adapters = ak.attach(nn.Sequential(nn.Linear(8, 8)).double())
    for name in ("x", "y"):
        adapters.add(name, ak.config("lora", r=4, target_modules=["0"], lora_dropout=0.5), activate=False)
        set_parameters(adapters, name)
    with torch.no_grad(), adapters.per_sample(["x", "y"]):
        for training in (False, True):
            adapters.model.train(training)
            first, second = (adapters.model(torch.ones(2, 8).double()) for _ in range(2))
            assert torch.equal(first, second) != training


# Changes between forwards


@pytest.mark.parametrize("change", ["behind torch's back", "parameter", "loaded", "dtype", "fused step"])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_changes_inside_the_block_act(method: str, change: str) -> None:
    adapters = adapted("bert", [method] * 2)
    names, given = ["a", "b", "a"], batch("bert", 3)
    with torch.no_grad(), adapters.per_sample(names):
        before = output(adapters.model, given)
        layer = adapters.model.bert.encoder.layer[0].attention.self.query.adapters["b"]
        owner, name, old = next((m, n, p) for m in layer.modules() for n, p in m.named_parameters(recurse=False))
        if change == "behind torch's back":
            old.data.add_(1)
        elif change == "parameter":
            setattr(owner, name, nn.Parameter(old + 1))
        elif change == "loaded":
            adapters.load_state_dict("b", {key: value + 1 for key, value in adapters.state_dict("b").items()})
        elif change == "dtype":
            adapters.model.float()
        else:
            old.grad = torch.ones_like(old)
            torch.optim.Adam([old], lr=0.1, fused=True).step()
        after = output(adapters.model, given)
        expected = alone(adapters, names, given)
    torch.testing.assert_close(after, expected)
    if change != "dtype":
        same = [torch.allclose(x, y) for x, y in zip(before, after, strict=True)]
        assert same == [True, False, True]


def test_it_maps_and_differentiates_under_functorch() -> None:
    adapters = odd("rows")
    model, x = adapters.model, sequences(3, 5)["x"]
    own = {key: p for key, p in model.named_parameters() if ".adapters.a." in key}
    with adapters.per_sample(["a", None, "b"], trainable=True):
        call = lambda given: torch.func.functional_call(model, given, (x,))  # noqa: E731
        found = torch.func.grad(lambda given: call(given).square().sum())(own)
        model(x).square().sum().backward()
        rows = torch.vmap(call)({key: torch.stack([p, 2 * p]).detach() for key, p in own.items()})
        torch.testing.assert_close(rows[1], call({key: 2 * p for key, p in own.items()}))
    for key, parameter in own.items():
        torch.testing.assert_close(found[key], parameter.grad)


def test_made_in_inference_mode_it_serves_outside_of_it() -> None:
    adapters = adapted("bert", ["lora", "vera", "loha"])
    names, given = ["a", "b", "c"], batch("bert", 3)
    with adapters.per_sample(names):
        with torch.inference_mode():
            output(adapters.model, given)
        embedded = adapters.model.get_input_embeddings()(given["input_ids"])
        with adapters.per_sample(["a", "b", "c"]):
            out = adapters.model(inputs_embeds=embedded.detach().requires_grad_(True)).logits
        out.sum().backward()
    torch.testing.assert_close(out.detach(), alone(adapters, names, {"inputs_embeds": embedded.detach()}))


# Contexts


def test_contexts_nest_and_all_is_given_back() -> None:
    adapters = adapted("embednet", ["lora", "lora"])
    given = batch("embednet", 2)
    adapters.activate("b")

    def out() -> Tensor:
        with torch.no_grad():
            return output(adapters.model, given)

    active = out()
    with adapters.per_sample(["a", None]):
        assert adapters.active == ("a",)
        rows = out()
        with adapters.disabled():
            bare = out()
        with adapters.activated("b", trainable=False):
            assert torch.equal(out(), active)
        with adapters.per_sample([None, "b"]):
            torch.testing.assert_close(out(), torch.stack([bare[0], active[1]]))
        with pytest.raises(RuntimeError, match="mine"), adapters.per_sample(["b", "b"]):
            raise RuntimeError("mine")
        assert torch.equal(out(), rows)
    assert adapters.active == ("b",)
    assert all(p.requires_grad for p in adapters.parameters("b"))
    assert torch.equal(out(), active)


def test_the_same_for_all_rows_is_that_adapter_active() -> None:
    adapters = with_heads(a=5, b=LABELS)
    given = batch("bert", 4)
    for own in ("a", "b", None):
        check(adapters, [own] * 4, given)


def test_nothing_is_left_of_it_after_detaching() -> None:
    model = build("t5").double()
    before = snapshot(model)
    adapters = ak.attach(model)
    adapters.add("a", ak.config("lora", target_modules=["q"]))
    with adapters.per_sample(["a", None]):
        model(**batch("t5", 2))
    assert_as_before(adapters.detach(), before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_inside_the_block_are_in_it_by_themselves(how: Any) -> None:
    adapters = adapted("embednet", ["lora", "vera"])
    names, given = ["a", "b", None], batch("embednet", 3)
    with torch.no_grad(), adapters.per_sample(names):
        expected = output(adapters.model, given)
        twin = how(adapters.model)
    with torch.no_grad():
        torch.testing.assert_close(output(twin, given), expected)
        assert not torch.allclose(output(adapters.model, given), expected)


@pytest.mark.filterwarnings("ignore:While 'h' has its head at")
def test_merged_adapters_act_on_every_row() -> None:
    adapters = adapted("bert", ["lora", "loha"])
    adapters.add("h", ak.config("lora", r=2, target_modules=["value"]), activate=False)
    set_parameters(adapters, "h")
    adapters.merge("h")
    names, given = ["a", None, "b"], batch("bert", 3)
    check(adapters, names, given)
    assert adapters.merged == ("h",)
    with pytest.raises(ak.StateError, match="Adapter 'h' is merged into the weights"), adapters.per_sample(["h", "a"]):
        pass


def test_what_another_thread_merges_acts_on_all_rows_until_it_is_unmerged() -> None:
    adapters, x = odd("rows"), sequences(3, 5)["x"]
    outputs = {}
    for names in (("a",), ("b",), ("a", "b"), ()):
        with adapters.activated(*names, trainable=False):
            outputs[names] = adapters.model(x)
    calls, done = queue.Queue[Any](), queue.Queue[object]()
    other = threading.Thread(target=lambda: [done.put(call()) for call in iter(calls.get, None)])
    other.start()  # outside of the block, so it is not in it
    with adapters.per_sample(["a", None, "b"]):
        adapters.model(x)
        for call, expected in (
            (lambda: adapters.merge("a"), [("a",), ("a",), ("a", "b")]),
            (adapters.unmerge, [("a",), (), ("b",)]),
        ):
            calls.put(call)
            done.get(timeout=60)
            for row, names in enumerate(expected):
                torch.testing.assert_close(adapters.model(x)[row], outputs[names][row])
    calls.put(None)
    other.join()


@pytest.mark.parametrize("call", ["merge", "remove", "rename", "unmerge", "detach", "merge_and_detach"])
def test_what_would_change_the_rows_adapters_waits_until_the_block_is_left(call: str) -> None:
    adapters = adapted("bert", ["lora", "lora"])
    arguments = {"merge": ("a",), "remove": ("a",), "rename": ("a", "z")}.get(call, ())
    with adapters.per_sample(["a", "b"]), pytest.raises(ak.StateError, match=f"{call} would change which adapters act"):
        getattr(adapters, call)(*arguments)
    assert adapters.names == ("a", "b")


@pytest.mark.parametrize("call", ["detach", "merge_and_detach"])
def test_a_model_whose_rows_are_bare_keeps_what_is_merged(call: str) -> None:
    adapters = adapted("bert", ["lora"])
    adapters.merge("a")
    with adapters.per_sample([None]), pytest.raises(ak.StateError, match="would change which adapters act"):
        getattr(adapters, call)()
    assert adapters.merged == ("a",)


def test_an_adapter_that_is_removed_in_a_nested_block_leaves_its_rows_bare() -> None:
    adapters = adapted("bert", ["lora", "lora"])
    given = batch("bert", 3)
    with torch.no_grad(), adapters.per_sample(["a", "b", None]):
        with adapters.disabled():
            adapters.remove("a")
            adapters.rename("b", "z")
        found = output(adapters.model, given)
    torch.testing.assert_close(found, alone(adapters, [None, "z", None], given))


# Refusals


@pytest.mark.parametrize("names", [[], "a", None, ("a", "b", "q")])
def test_names_are_checked(names: Any) -> None:
    adapters = adapted("bert", ["lora", "lora"])
    kind = ak.UnknownNameError if names == ("a", "b", "q") else ak.ConfigError
    message = "Unknown adapter 'q'" if kind is ak.UnknownNameError else "per_sample needs an adapter's name or None for"
    with pytest.raises(kind, match=message), adapters.per_sample(names):
        pass
    assert adapters.active == ()


@pytest.mark.parametrize("names", [["a", "b", None], ["a"] * 3])
def test_a_batch_of_another_size_is_refused(names: Names) -> None:
    adapters, message = adapted("bert", ["lora", "lora"]), "per_sample names 3 rows, and the batch has 4"
    with pytest.raises(ak.ConfigError, match=message), adapters.per_sample(names):
        adapters.model(**batch("bert", 4))
    assert adapters.active == ()


def test_where_rows_and_places_are_as_many_the_layer_must_be_known_from_another_batch() -> None:
    adapters = adapted("bert", ["lora", "lora"])
    names = ["a", "b", None, "a", "b", None]
    assert batch("bert", 6)["input_ids"].shape == (6, 6)
    message = "as many rows in the batch as places in each, so it cannot be told which it is"
    with pytest.raises(ak.StateError, match=message), adapters.per_sample(names):
        adapters.model(**batch("bert", 6))
    with torch.no_grad(), adapters.per_sample(names, batch_first=True):
        trusted = output(adapters.model, batch("bert", 6))
    torch.testing.assert_close(trusted, alone(adapters, names, batch("bert", 6)))
    check(adapters, ["a", "b", None], batch("bert", 3))
    check(adapters, names, batch("bert", 6))


class Odd(nn.Module):
    """A model whose one adapted layer is given its input in some order. Input `(batch, length, 4)`."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.fc, self.places = order, nn.Linear(4, 4), nn.Embedding(8, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "flat":
            return self.fc(x.flatten(0, 1)).view(x.shape)
        if self.order == "length first":
            return self.fc(x.transpose(0, 1)).transpose(0, 1)
        if self.order == "rows":
            return self.fc(x)
        if self.order == "some tokens":
            return self.fc(x.flatten(0, 1)[1:]).sum(0).expand(x.shape)
        if self.order == "windows":
            return self.fc(x.reshape(2 * len(x), -1, 4)).view(x.shape)
        return x + self.places(torch.arange(x.shape[1]))


def odd(order: str, target: str = "fc") -> ak.Adapters:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return two(Odd(order), target)


def sequences(count: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(count, length, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("length", [2, 3, 5])
def test_tokens_that_were_flattened_are_their_rows(length: int) -> None:
    check(odd("flat"), ["a", None, "b", "a"], sequences(4, length))


def test_what_is_in_no_known_order_may_be_vouched_for() -> None:
    adapters, names, given = odd("windows"), ["a", None, "b"], sequences(3, 4)
    with pytest.raises(
        ak.StateError, match=r"A Linear .* first dimension is 6, and the batch has 3 rows, so it is not known"
    ):
        check(adapters, names, given)
    with adapters.per_sample(names, batch_first=True), torch.no_grad():
        found = output(adapters.model, given)
    torch.testing.assert_close(found, alone(adapters, names, given))


@pytest.mark.parametrize("length", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("order", "target"), [("length first", "fc"), ("some tokens", "fc"), ("places", "places")])
def test_an_input_in_another_order_is_refused_whatever_its_size(order: str, target: str, length: int) -> None:
    adapters = odd(order, target)
    with (
        pytest.raises(ak.StateError, match=r"per_sample\(\.\.\., batch_first=True\)"),
        adapters.per_sample(["a", None, "b"]),
    ):
        adapters.model(**sequences(3, length))


def with_images(target: str) -> tuple[ak.Adapters, dict[str, Tensor]]:
    """A model that puts images into its tokens, and two rows: the first has two images, the second none."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=4, patch_size=2, projection_dim=8)
    text = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=30)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=29, image_seq_length=4)
    adapters = two(transformers.LlavaForConditionalGeneration(config), target)
    tokens, images = torch.arange(22).view(2, 11), torch.linspace(-1, 1, 96).view(2, 3, 4, 4).double()
    tokens[0, 1:5] = tokens[0, 6:10] = 29
    return adapters, {"input_ids": tokens, "pixel_values": images}


@pytest.mark.parametrize(
    "target", ["vision_tower.encoder.layers.0.self_attn.q_proj", "model.multi_modal_projector.linear_1"]
)
def test_images_are_not_taken_for_rows(target: str) -> None:
    adapters, given = with_images(target)
    message = "A Linear of the model is in or behind a CLIPVisionModel that is given something else than the batch"
    with pytest.raises(ak.StateError, match=message), adapters.per_sample(["a", "b"]):
        adapters.model(**given)


def test_rows_may_have_any_number_of_images() -> None:
    adapters, given = with_images("language_model.layers.0.self_attn.q_proj")
    tokens, images = given["input_ids"], torch.cat([given["pixel_values"]] * 2)[:3]
    tokens[1, 3:7] = 29
    with torch.no_grad(), adapters.per_sample(["a", "b"]):
        found = output(adapters.model, {"input_ids": tokens, "pixel_values": images})
    for i, (name, own) in enumerate([("a", images[:2]), ("b", images[2:])]):
        with torch.no_grad(), adapters.activated(name, trainable=False):
            alone = output(adapters.model, {"input_ids": tokens[i : i + 1], "pixel_values": own})
        torch.testing.assert_close(found[i : i + 1], alone)


def test_patches_are_not_taken_for_rows() -> None:
    class Patched(nn.Module):
        """A model with one inside that is given patches: other entries than the batch's."""

        def __init__(self) -> None:
            super().__init__()
            self.inside: Any = Odd("rows").double()
            self.inside.base_model_prefix = ""

        def forward(self, input_ids: Tensor, patches: Tensor) -> Tensor:
            return self.inside(patches)

    adapters = two(Patched(), "fc")
    with pytest.raises(ak.StateError, match="in or behind a Odd"), adapters.per_sample(["a", "b"]):
        adapters.model(torch.ones(2, 7, dtype=torch.long), torch.randn(12, 4).double())


def test_the_batch_is_read_from_the_models_first_input() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.fc(x) * scale

    adapters = two(Scaled(), "fc")
    x, scale = torch.randn(2, 4).double(), torch.randn(1, 4).double()
    with adapters.per_sample(["a", None]):
        found = adapters.model(scale=scale, x=x)
    for row, name in enumerate(("a", None)):
        with adapters.activated(*([name] if name else [])):
            torch.testing.assert_close(found[row : row + 1], adapters.model(x[row : row + 1], scale))


def test_the_choices_of_a_row_are_its_own() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=30, max_position_embeddings=8)
    adapters = two(transformers.BertForMultipleChoice(config), "query")
    check(adapters, ["b", None, "a"], {"input_ids": torch.arange(3 * 4 * 5).view(3, 4, 5) % 30})


def test_experts_are_refused_by_their_place() -> None:
    adapters = odd("flat", "experts.0")
    message = "Adapter 'a' changes 'experts.0', an expert that is given tokens of several rows in an order of its own"
    with pytest.raises(ak.StateError, match=message), adapters.per_sample(["a", "b"]):
        pass


@pytest.mark.parametrize("first", [False, True])
def test_a_module_that_has_the_batch_second_is_refused(first: bool) -> None:
    adapters = two(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=first), "linear1", "linear2")
    given = {"src": torch.randn(3, 5, 8).double()}
    if first:
        check(adapters, ["b", "a", None], given)
        return
    message = "'self_attn' is a MultiheadAttention with batch_first=False, so rows of the batch may not be"
    with pytest.raises(ak.StateError, match=message), adapters.per_sample(["b", "a", None]):
        pass


def test_a_layer_s_input_must_have_a_dimension_for_the_batch() -> None:
    adapters = odd("flat")
    message = "with one tensor that has a batch dimension"
    ragged = torch.nested.nested_tensor([torch.randn(length, 4).double() for length in (2, 3)], layout=torch.jagged)
    for x in (torch.randn(4).double(), ragged):
        with pytest.raises(ak.UnsupportedError, match=message), adapters.per_sample(["a", "b"]):
            adapters.model.fc(x)
    message = "gets 3, which is not a multiple"
    with pytest.raises(ak.ConfigError, match=message), adapters.per_sample(["a", "b"], batch_first=True):
        adapters.model.fc(sequences(3, 5)["x"])


def test_a_part_of_the_model_called_by_itself_has_its_own_batch() -> None:
    adapters, names, x = odd("flat"), ["a", None, "b"], sequences(6, 5)["x"]
    with torch.no_grad():
        with adapters.per_sample(names):
            found = adapters.model.fc(x)
        for i, own in enumerate(names):
            with adapters.activated(*([own] if own else []), trainable=False):
                torch.testing.assert_close(found[2 * i : 2 * i + 2], adapters.model.fc(x[2 * i : 2 * i + 2]))


def test_replicas_of_data_parallel_are_refused() -> None:
    adapters = odd("flat")
    with adapters.per_sample(["a", "b"]):
        replica = adapters.model._replicate_for_data_parallel()
        with pytest.raises(ak.StateError, match=r"nn\.DataParallel splits it among its replicas"):
            replica(**sequences(2, 3))


# Other tools


def compiled(adapters: ak.Adapters) -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(adapters.model, fullgraph=True, backend="eager")


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_compiled_linear_layers_serve_every_assignment_of_the_same_adapters() -> None:
    adapters = adapted("embednet", ["lora", "lora", "vera"], target_modules=["layers.0", "overhead"])
    model, seen = compiled(adapters), []
    for names in (["a", "b", "c"], ["c", "a", "b"], ["a", None, "b"], [None, "b", "a"]):
        given = batch("embednet", 3)
        with torch.no_grad(), adapters.per_sample(names):
            found = output(model, given)
        seen.append(graphs())
        torch.testing.assert_close(found, alone(adapters, names, given))
    assert seen == [1, 1, 2, 2]


def test_compiled_layers_of_every_sort_are_right() -> None:
    adapters = adapted("convnet", METHODS, target_modules=["conv1d", "grouped", "fc"])
    model, given = compiled(adapters), batch("convnet", 3)
    for names in (["a", "b", "c"], ["e", "d", None]):
        with torch.no_grad(), adapters.per_sample(names):
            found = output(model, given)
        torch.testing.assert_close(found, alone(adapters, names, given))


def test_offloaded_layers_are_fetched() -> None:
    from accelerate import cpu_offload

    adapters = adapted("bert", ["lora", "vera", "scale"])
    names, given = ["a", "b", None, "c"], batch("bert", 4)
    with torch.no_grad():
        expected = alone(adapters, names, given)
        cpu_offload(adapters.model, execution_device="cpu")
        with adapters.per_sample(names):
            torch.testing.assert_close(output(adapters.model, given), expected)
