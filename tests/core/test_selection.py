"""Which layers a config adapts: PEFT's rules where PEFT is right, and our deviations, each by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tests.models import EmbeddingNet, build
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig

import adapterkit as ak
from adapterkit.contract import patterns as matching
from adapterkit.model import default_targets as defaults
from adapterkit_lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


class Block(nn.Module):
    """One layer of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(2, 2), nn.Linear(2, 2)


class Stack(nn.Module):
    """A numbered stack called `layers`."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))


class TwoStacks(nn.Module):
    """As Florence-2: an image tower, an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(2))})
        self.language_model = nn.ModuleDict({"encoder": Stack(3), "decoder": Stack(2)})


class Shared(nn.Module):
    """One module under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2)


def select(model: nn.Module, targets: Any, **fields: Any) -> ak.Selection:
    return ak.select(model, LoraConfig(**{"target_modules": targets, "modules_to_save": None, **fields}))


# Where PEFT is right

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
LIKE_PEFT: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", ["q_proj", "self_attn.v_proj"], {}),
    ("llama", [Q0, V1, "0.self_attn.k_proj", "embed_tokens", "lm_head"], {}),
    ("llama", r".*\.[qk]_proj", {}),
    ("llama", Q0, {}),
    ("llama", "all-linear", {}),
    ("llama", ["q_proj", "v_proj"], {"exclude_modules": ["v_proj"]}),
    ("llama", ["q_proj", "v_proj"], {"exclude_modules": [Q0, "1.self_attn.v_proj"]}),
    ("llama", r".*proj", {"exclude_modules": r".*layers\.0.*"}),
    ("llama", "all-linear", {"exclude_modules": ["mlp.up_proj"]}),
    ("llama", ["q_proj"], {"exclude_modules": []}),
    ("llama", ["q_proj"], {"layers_to_transform": 1}),
    ("llama", ["q_proj"], {"layers_to_transform": [0, 1], "layers_pattern": "layers"}),
    ("llama", ["q_proj"], {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    ("llama", ["q_proj", "lm_head"], {"modules_to_save": ["lm_head"]}),
    ("llama", "all-linear", {"modules_to_save": ["mlp"]}),
    ("llama", ["q_proj"], {"modules_to_save": ["layers.0.self_attn"]}),
    ("gpt2", ["c_attn", "wte"], {}),
    ("gpt2", "all-linear", {}),
    ("bert", ["attention.output.dense"], {"layers_to_transform": [0]}),
    ("bert", "all-linear", {"task_type": "SEQ_CLS"}),
    ("t5", ["q"], {"layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", ["q", "o"], {"layers_to_transform": [1]}),
    ("t5", "all-linear", {}),
    ("bart", ["encoder_attn.q_proj", "fc1"], {"layers_to_transform": [1]}),
    *((name, None, {}) for name in ("llama", "gpt2", "bert", "t5", "bart", "gemma3")),
    ("vit", ["q_proj", "projection"], {}),
    ("convnet", "conv[12]d", {}),
    ("embednet", ["embed", "overhead"], {}),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")
@pytest.mark.parametrize(("name", "targets", "fields"), LIKE_PEFT, ids=str)
def test_the_layers_are_those_that_peft_targets(name: str, targets: Any, fields: dict[str, Any]) -> None:
    fields = {"target_modules": targets, **fields}
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(**fields)).targeted_module_names
    ours = ak.select(build(name), LoraConfig(**{"modules_to_save": None, **fields})).paths
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize(
    "table",
    [
        {"q_proj": 2},
        {"self_attn.q_proj": 2, "q_proj": 3},
        {"q_proj": 3, "self_attn.q_proj": 2},
        {"^model.layers.0": 2},
        {"^model.layers.0.*": 2, ".*": 5},
        {"roj": 2, ".roj": 4, "[qv]_proj": 6},
        {"v_proj": 3, "[qv]_proj": 6},
        {r"layers\.1\.self_attn\.\w_proj": 7},
        {"q_proj|v_proj": 2},
        {"layers.0.self_attn.q_proj": 2, r"^model\.layers\.0\.self_attn\.v_proj$": 3, "model.layers.1": 4},
        {"^layers.0.self_attn.q_proj": 2, "attn.q_proj": 3, "layers.0.self.attn.k_proj": 4, "o_proj$": 5},
        {r"^(?:model\.layers\.0\.self_attn\.q_proj|model\.layers\.1\.mlp\.up_proj)": 6, "self_attn.q_proj": 7},
        {".*layers.0.self_attn.q_proj": 2, r".*\.v_proj": 3, ".*_proj": 4, ".*.down_proj": 5},
        {"layers.1.self_attn..*": 3, "layers.1.self_attn.q_proj": 4, "up_proj": 5, "mlp.up_proj": 6},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")
def test_rank_patterns_give_each_layer_the_rank_that_peft_gives_it(table: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    ours = matching.PatternTable(table, "rank_pattern")
    for path in select(build("llama"), "all-linear").paths:
        assert ours.get(path, 8) == table.get(get_pattern_key(table.keys(), path), 8)


def test_plain_names_are_found_without_a_regular_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "Pattern", None)  # thousands of them would take minutes
    paths = [f"layers.{i}.q_proj" for i in range(20)]
    config = LoraConfig.with_values({"lora_alpha": {path: float(i + 1) for i, path in enumerate(paths)}})
    assert [config.at(path).lora_alpha for path in paths] == list(range(1, 21))
    table = matching.PatternTable(dict.fromkeys(paths, 3), "")
    assert [table.get(f"model.{path}", 8) for path in paths] == [3] * 20
    assert table.get("a", 8) == 8


def test_the_defaults_are_those_of_peft() -> None:
    ours = {name: found if isinstance(found, str) else list(found) for name, found in defaults.TARGETS.items()}
    assert ours == PEFT_TARGETS


# Layer numbers


def experts() -> nn.Module:
    """A numbered stack in a numbered stack: the first number of a path counts."""
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"experts": Stack(3).layers}) for _ in range(2))})


MLP_AND_ATTENTION = (*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down")))
ENCODER, DECODER = "language_model.encoder.layers", "language_model.decoder.layers"
# model, target_modules, layers_to_transform, layers_pattern, what is selected
NUMBERED: list[tuple[Callable[[], nn.Module], Any, Any, Any, tuple[str, ...]]] = [
    (lambda: build("llama"), [Q0, V1], [1], None, (V1,)),
    (lambda: build("llama"), "all-linear", [1], None, tuple(f"model.layers.1.{n}" for n in MLP_AND_ATTENTION)),
    (lambda: build("embednet"), ["layers.0", "layers.1"], [1], None, ("layers.1",)),
    (lambda: Stack(3), ["q_proj"], [-3, 1], None, ("layers.0.q_proj", "layers.1.q_proj")),
    (lambda: Stack(3), ["q_proj"], [0, -1], None, ("layers.0.q_proj", "layers.2.q_proj")),
    (TwoStacks, ["q_proj"], [-1], "layers", (f"{ENCODER}.2.q_proj", f"{DECODER}.1.q_proj")),
    (
        TwoStacks,
        ["q_proj"],
        {"encoder.layers": [-1], "decoder.layers": "all"},
        None,
        (f"{ENCODER}.2.q_proj", f"{DECODER}.0.q_proj", f"{DECODER}.1.q_proj"),
    ),
    (experts, ["q_proj"], [1], None, tuple(f"layers.1.experts.{i}.q_proj" for i in range(3))),
]


@pytest.mark.parametrize(("make", "targets", "numbers", "pattern", "paths"), NUMBERED, ids=range(len(NUMBERED)))
def test_layer_numbers(
    make: Callable[[], nn.Module], targets: Any, numbers: Any, pattern: Any, paths: tuple[str, ...]
) -> None:
    assert select(make(), targets, layers_to_transform=numbers, layers_pattern=pattern).paths == paths


def test_a_layer_is_told_with_the_longest_entry_that_takes_it() -> None:
    targets = ak.select(EmbeddingNet(), LoraConfig(target_modules=["0", "layers.0", "1"])).targets
    assert [match.rule for match in targets] == ["target_modules 'layers.0'", "target_modules '1'"]


def test_layers_that_the_numbers_leave_out_are_told_with_the_reason() -> None:
    selection = select(build("llama"), [Q0, V1, "lm_head"], layers_to_transform=[1])
    assert selection.skipped == (
        (Q0, "layers_to_transform leaves out layer 0 of 'model.layers'"),
        ("lm_head", "layers_to_transform: it is outside the stacks whose layers are counted"),
    )


# Heads


def test_modules_to_save_match_at_a_dot_and_a_head_inside_another_is_left_to_it() -> None:
    assert select(build("embednet"), ["embed"], modules_to_save=["head"]).heads == ("head",)
    heads = select(build("llama"), ["q_proj"], modules_to_save=["mlp", "up_proj", "norm"]).heads
    assert heads == ("model.layers.0.mlp", "model.layers.1.mlp", "model.norm")


def test_layers_inside_a_head_are_no_targets() -> None:
    selection = select(build("llama"), ["up_proj", "q_proj"], modules_to_save=["layers.0.mlp", "layers.1.mlp"])
    assert {path.rpartition(".")[2] for path in selection.paths} == {"q_proj"}
    reason = "modules_to_save trains 'model.layers.0.mlp' in full"
    assert ("model.layers.0.mlp.up_proj", reason) in selection.skipped


# "all-linear"


def test_all_linear_takes_what_torchs_attention_reads_and_no_heads_and_no_other_kinds() -> None:
    for name, head in (("bert", "classifier"), ("vit", "classifier"), ("llama", "lm_head")):
        assert (head, "the output head") in select(build(name), "all-linear").skipped  # without a task type
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))
    assert select(model, "all-linear").paths == ("0.self_attn.out_proj", "0.linear1", "0.linear2")
    assert select(build("convnet"), "all-linear").paths == ("fc", "head")


def test_all_linear_leaves_out_routers_which_return_several_tensors() -> None:
    model = build("llama")
    model.model.layers[0].mlp.router = Llama4Router(Llama4TextConfig(hidden_size=16))
    reason = "a Llama4Router returns several tensors"
    assert ("model.layers.0.mlp.router", reason) in select(model, "all-linear").skipped


# Entries that match nothing


@pytest.mark.parametrize(
    ("fields", "unmatched"),
    [
        ({"target_modules": ["q_proj", "nope"]}, ["target_modules 'nope'"]),
        ({"target_modules": ["q_proj", "self_attn.q_proj", Q0]}, []),  # they overlap
        ({"exclude_modules": ["nope"]}, ["exclude_modules 'nope'"]),
        ({"rank_pattern": {"q_proj": 2, "k_proj": 3}}, ["rank_pattern 'k_proj'"]),
        ({"alpha_pattern": {"q_porj": 2}}, ["alpha_pattern 'q_porj'"]),
        ({"layers_to_transform": [0, 2, -2, -3]}, ["layers_to_transform 2", "layers_to_transform -3"]),
        (
            {"layers_to_transform": {"layers": [0], "blocks": "all", "h": [1]}},
            ["layers_to_transform 'blocks'", "layers_to_transform 'h' 1"],
        ),
    ],
    ids=str,
)
def test_entries_that_match_nothing_are_unmatched(fields: dict[str, Any], unmatched: list[str]) -> None:
    targets = fields.pop("target_modules", ["q_proj"])
    assert list(select(build("llama"), targets, **fields).unmatched) == unmatched


# Regular expressions


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": r"(a|aa)+!"},
        {"exclude_modules": r"(a|aa)+!"},
        {"rank_pattern": {r"(a|aa)+!": 2}},
        {"alpha_pattern": {r"(a|aa)+!": 2}},
        {"layers_to_transform": [0], "layers_pattern": r"(a|aa)+!"},
        {"layers_to_transform": {r"(a|aa)+!": [0]}},
    ],
    ids=str,
)
def test_a_regular_expression_that_never_ends_hits_the_time_limit(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "TIME_LIMIT_SECONDS", 0.1)
    model = nn.ModuleDict({"a" * 60: nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(ak.ConfigError, match="backtracks without end"):  # without the limit: longer than the universe
        select(model, **{"targets": ["0"], **fields})


def test_the_time_limit_is_for_all_matches_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "TIME_LIMIT_SECONDS", 0.1)
    pattern = matching.Pattern(r"(a|aa)+!", "target_modules")
    compiled, given = pattern._compiled, []

    class Recording:
        def fullmatch(self, path: str, timeout: float) -> object:
            given.append(timeout)
            return compiled.fullmatch(path, timeout=timeout)

    pattern._compiled = Recording()
    for _ in range(5):
        with pytest.raises(ak.ConfigError, match="took over"):
            pattern.matches("a" * 60)
    assert given == [0.1, *[1e-3] * 4]  # the first one has used up what they had


# Shared modules


@pytest.mark.parametrize("entry", [["first"], ["second"], "second", ["first", "second"], "first|second"], ids=str)
def test_a_shared_module_is_known_by_any_of_its_paths_once(entry: Any) -> None:
    selection = select(Shared(), entry)
    assert (selection.paths, selection.unmatched) == (("first",), ())
    assert select(Shared(), "all-linear", exclude_modules=entry).paths == ("other",)
    if isinstance(entry, list):
        selection = select(Shared(), "all-linear", modules_to_save=entry)
        assert (selection.heads, selection.paths) == (("first",), ("other",))


# The selection itself


def test_the_printed_form_shows_layers_rules_heads_and_what_matched_nothing() -> None:
    selection = select(
        build("embednet"),
        ["layers.0", "layers.1", "embed", "head", "nope"],
        exclude_modules=["layers.1"],
        modules_to_save=["head"],
        rank_pattern={"embed": 2, "none": 3},
    )
    assert str(selection) == (
        "2 layers adapted, 1 module trained in full\n"
        "  embed     Embedding(32 -> 8)  target_modules 'embed'\n"
        "  layers.0  Linear(8 -> 8)      target_modules 'layers.0'\n"
        "  head      trained in full     modules_to_save\n"
        "left out:\n"
        "  layers.1  exclude_modules 'layers.1'\n"
        "  head      modules_to_save trains 'head' in full\n"
        "matched nothing:\n"
        "  target_modules 'nope'\n"
        "  rank_pattern 'none'"
    )


def test_layers_that_differ_only_in_numbers_share_a_line() -> None:
    lines = str(select(build("bert"), ["query", "value"])).splitlines()
    assert lines[0].startswith("4 layers adapted")
    assert [line.split()[0] for line in lines[1:3]] == [
        f"bert.encoder.layer.{{0-1}}.attention.self.{name}" for name in ("query", "value")
    ]


def test_select_changes_nothing() -> None:
    model = build("bert")
    before = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    ak.select(model, LoraConfig())
    assert {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_select_works_on_the_meta_device() -> None:
    found = [(m.path, m.kind) for m in select(build("convnet").to("meta"), ["conv1d", "conv3d", "fc"]).targets]
    assert found == [(m.path, m.kind) for m in select(build("convnet"), ["conv1d", "conv3d", "fc"]).targets]
    assert [(path, kind.name) for path, kind in found] == [("conv1d", "Conv1d"), ("conv3d", "Conv3d"), ("fc", "Linear")]


def test_select_does_not_look_at_the_adapters_there_are() -> None:
    model = build("bert")
    before = ak.select(model, LoraConfig(target_modules="all-linear"))
    ak.attach(model).add("q_proj", LoraConfig(target_modules="all-linear", bias="all"))
    after = ak.select(model, LoraConfig(target_modules="all-linear"))
    assert (after.paths, after.heads, str(after)) == (before.paths, before.heads, str(before))


@pytest.mark.parametrize("fields", [{"layers_to_transform": [0]}, {"layers_to_transform": {"layers": [0]}}], ids=str)
def test_entry_whose_every_layer_the_numbers_leave_out_is_told(fields: dict[str, Any]) -> None:
    config = LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=None, **fields)
    with pytest.warns(
        ak.AdapterWarning, match="matched nothing: target_modules 'lm_head' .*'lm_head': .* outside the stacks"
    ):
        report = ak.attach(build("llama")).add("a", config)
    assert report.targets == ("model.layers.0.self_attn.q_proj",)
    assert "lm_head" in str(report)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_model_with_adapters_of_peft_is_refused(targets: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    wrapped = peft.get_peft_model(build("llama"), config)
    for theirs in (peft.inject_adapter_in_model(config, build("llama")), wrapped.get_base_model()):
        with pytest.raises(ak.SelectionError, match=r"adapters of PEFT, such as at '.*q_proj'\. Take them off first: "):
            ak.attach(theirs).add("a", LoraConfig(target_modules=targets))
    assert ak.attach(wrapped.unload()).add("a", LoraConfig(target_modules=targets)).targets


def test_all_linear_tells_that_it_leaves_out_the_experts_of_a_mixture() -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        num_key_value_heads=1,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    report = ak.attach(model).add("a", ak.LoraConfig(r=2, target_modules="all-linear"))
    (note,) = report.notes
    assert "'all-linear' leaves out 2 modules with stacked matrices" in note
    assert "'model.layers.0.mlp.experts', a Qwen3MoeExperts" in note
    assert not ak.attach(model).add("b", ak.LoraConfig(r=2, target_modules=["q_proj"])).notes
