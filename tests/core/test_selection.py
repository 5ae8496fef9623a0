"""Which layers a config adapts: PEFT's rules where PEFT is right, and our deviations, each by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tests.models import build
from torch import nn

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
LIKE_PEFT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": [Q0, V1]}),
    ("llama", {"target_modules": ["0.self_attn.q_proj", "1.mlp.up_proj"]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": r".*\.[qk]_proj"}),
    ("llama", {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"}),
    ("llama", {"target_modules": Q0}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": [Q0, "1.self_attn.v_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"}),
    ("llama", {"target_modules": r".*proj", "exclude_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.self_attn"]}),
    ("llama", {"target_modules": None}),
    ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["attn.c_proj"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": None}),
    ("bert", {"target_modules": ["query", "output.dense"]}),
    ("bert", {"target_modules": ["attention.output.dense"], "layers_to_transform": [0]}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": None}),
    ("t5", {"target_modules": ["q", "o"]}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [1]}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": None}),
    ("bart", {"target_modules": ["encoder_attn.q_proj", "fc1"], "layers_to_transform": [1]}),
    ("bart", {"target_modules": r".*decoder.*\.(q_proj|fc1)"}),
    ("bart", {"target_modules": None}),
    ("gemma3", {"target_modules": None}),
    ("vit", {"target_modules": ["q_proj", "projection"]}),
    ("convnet", {"target_modules": ["conv1d", "conv2d", "fc"]}),
    ("convnet", {"target_modules": "conv[12]d"}),
    ("embednet", {"target_modules": ["embed", "overhead"]}),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")
@pytest.mark.parametrize(("name", "fields"), LIKE_PEFT, ids=str)
def test_the_layers_are_those_that_peft_targets(name: str, fields: dict[str, Any]) -> None:
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
        {r"layers\.1\.self_attn\.\w_proj": 7},
        {"q_proj|v_proj": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")
def test_rank_patterns_give_each_layer_the_rank_that_peft_gives_it(table: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    ours = matching.PatternTable(table, "rank_pattern")
    for path in select(build("llama"), "all-linear").paths:
        assert ours.get(path, 8) == table.get(get_pattern_key(table.keys(), path), 8)


@pytest.mark.parametrize("model_type", sorted(PEFT_TARGETS))
def test_the_default_of_each_model_type_is_pefts(model_type: str) -> None:
    theirs = PEFT_TARGETS[model_type]
    ours = defaults.TARGETS[model_type]
    assert (ours if isinstance(theirs, str) else list(ours)) == theirs


def test_there_are_defaults_for_pefts_model_types_and_no_others() -> None:
    assert set(defaults.TARGETS) == set(PEFT_TARGETS)


# Layer numbers


def test_layer_numbers_hold_for_exact_names() -> None:
    selection = select(build("llama"), [Q0, V1], layers_to_transform=[1])
    assert selection.paths == (V1,)
    assert selection.skipped == ((Q0, "layers_to_transform leaves out layer 0 of 'model.layers'"),)


def test_layer_numbers_leave_out_named_layers_that_are_in_no_stack() -> None:
    selection = select(build("llama"), ["v_proj", "lm_head"], layers_to_transform=[1])
    assert selection.paths == (V1,)
    assert ("lm_head", "layers_to_transform: it is in no stack that is counted") in selection.skipped


def test_layer_numbers_hold_for_regular_expressions() -> None:
    assert select(build("llama"), r".*\.v_proj", layers_to_transform=[1]).paths == (V1,)


def test_layer_numbers_hold_for_all_linear() -> None:
    paths = select(build("llama"), "all-linear", layers_to_transform=[1]).paths
    assert len(paths) == 7
    assert all(path.startswith("model.layers.1.") for path in paths)


@pytest.mark.parametrize("pattern", [None, "layers"])
def test_layer_numbers_hold_for_stacks_at_the_top(pattern: str | None) -> None:
    paths = select(Stack(3), ["q_proj"], layers_to_transform=[1], layers_pattern=pattern).paths
    assert paths == ("layers.1.q_proj",)


def test_layers_that_are_themselves_numbered_are_counted() -> None:
    assert select(build("embednet"), ["layers.0", "layers.1"], layers_to_transform=[1]).paths == ("layers.1",)


@pytest.mark.parametrize(("wanted", "kept"), [(-1, {2}), ([-1], {2}), ([-3, 1], {0, 1}), ([0, -1], {0, 2})])
def test_negative_numbers_count_from_the_end(wanted: Any, kept: set[int]) -> None:
    paths = select(Stack(3), ["q_proj"], layers_to_transform=wanted).paths
    assert set(paths) == {f"layers.{i}.q_proj" for i in kept}


def test_negative_numbers_count_from_the_end_of_each_stack() -> None:
    paths = select(TwoStacks(), ["q_proj"], layers_to_transform=[-1], layers_pattern="layers").paths
    assert paths == ("language_model.encoder.layers.2.q_proj", "language_model.decoder.layers.1.q_proj")


def test_the_first_number_of_a_path_is_the_layers() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"experts": Stack(3).layers}) for _ in range(2))})
    paths = select(model, ["q_proj"], layers_to_transform=[1]).paths
    assert paths == tuple(f"layers.1.experts.{i}.q_proj" for i in range(3))


def test_layer_numbers_that_do_not_exist_are_unmatched() -> None:
    selection = select(Stack(2), ["q_proj"], layers_to_transform=[0, 2, -2, -3])
    assert selection.unmatched == ("layers_to_transform 2", "layers_to_transform -3")


def test_a_mapping_gives_each_stack_its_own_numbers() -> None:
    selection = select(TwoStacks(), ["q_proj"], layers_to_transform={"encoder.layers": [-1], "decoder.layers": "all"})
    assert selection.paths == (
        "language_model.encoder.layers.2.q_proj",
        "language_model.decoder.layers.0.q_proj",
        "language_model.decoder.layers.1.q_proj",
    )
    assert ("vision_tower.blocks.0.q_proj", "layers_to_transform: it is in no stack that is counted") in (
        selection.skipped
    )


def test_encoders_last_layers_and_all_of_the_decoder_are_one_config_by_a_regex_too() -> None:
    by_regex = select(TwoStacks(), r".*(encoder\.layers\.[12]|decoder\.layers\.\d+)\.[qk]_proj")
    by_fields = select(
        TwoStacks(), ["q_proj", "k_proj"], layers_to_transform={"encoder.layers": [-2, -1], "decoder.layers": "all"}
    )
    assert len(by_regex.paths) == 8
    assert by_regex.paths == by_fields.paths


def test_a_stack_that_is_not_there_is_unmatched() -> None:
    selection = select(Stack(2), ["q_proj"], layers_to_transform={"layers": [0], "blocks": "all", "h": [1]})
    assert selection.unmatched == ("layers_to_transform 'blocks'", "layers_to_transform 'h' 1")


def test_a_mapping_names_its_stacks_itself() -> None:
    with pytest.raises(ak.ConfigError, match="names its stacks itself here; leave layers_pattern out"):
        select(Stack(2), ["q_proj"], layers_to_transform={"layers": [0]}, layers_pattern="layers")


def test_a_stacks_numbers_are_a_list_or_all() -> None:
    with pytest.raises(ak.ConfigError, match="'last' is neither 'all' nor a list of layer numbers"):
        select(Stack(2), ["q_proj"], layers_to_transform={"layers": "last"})


# Heads


def test_modules_to_save_match_at_a_dot() -> None:
    assert select(build("embednet"), ["embed"], modules_to_save=["head"]).heads == ("head",)


def test_modules_to_save_that_match_nothing_are_an_error_with_the_nearest() -> None:
    with pytest.raises(ak.SelectionError, match=r"modules_to_save 'haed' matched no module; .* Nearest: 'head'"):
        select(build("embednet"), ["embed"], modules_to_save=["haed"])


def test_a_head_inside_another_is_left_to_it() -> None:
    heads = select(build("llama"), ["q_proj"], modules_to_save=["mlp", "up_proj", "norm"]).heads
    assert heads == ("model.layers.0.mlp", "model.layers.1.mlp", "model.norm")


def test_layers_inside_a_head_are_no_targets() -> None:
    selection = select(build("llama"), ["up_proj", "q_proj"], modules_to_save=["layers.0.mlp", "layers.1.mlp"])
    assert {path.rpartition(".")[2] for path in selection.paths} == {"q_proj"}
    reason = "modules_to_save trains 'model.layers.0.mlp' in full"
    assert ("model.layers.0.mlp.up_proj", reason) in selection.skipped


@pytest.mark.parametrize(
    ("name", "heads"), [("bert", ("classifier",)), ("vit", ("classifier",)), ("llama", ()), ("convnet", ())]
)
def test_auto_takes_the_task_head_of_transformers_models(name: str, heads: tuple[str, ...]) -> None:
    assert ak.select(build(name), LoraConfig(target_modules=r".*(query|q_proj|fc)")).heads == heads


# "all-linear"


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("vit", "classifier"), ("llama", "lm_head")])
def test_all_linear_leaves_the_output_head_out_without_a_task_type(name: str, head: str) -> None:
    assert (head, "the output head") in select(build(name), "all-linear").skipped


def test_all_linear_takes_what_torchs_attention_reads() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))
    assert select(model, "all-linear").paths == ("0.self_attn.out_proj", "0.linear1", "0.linear2")


def test_all_linear_takes_no_other_kinds() -> None:
    assert select(build("convnet"), "all-linear").paths == ("fc", "head")


# Entries that match nothing


def test_an_unmatched_entry_of_a_list_warns_with_its_name() -> None:
    with pytest.warns(ak.AdapterWarning, match="matched nothing: target_modules 'v_porj'"):
        report = ak.attach(build("llama")).add("a", LoraConfig(target_modules=["q_proj", "v_porj"]))
    assert report.unmatched == ("target_modules 'v_porj'",)


@pytest.mark.parametrize(
    ("fields", "unmatched"),
    [
        ({"target_modules": ["q_proj", "nope"]}, "target_modules 'nope'"),
        ({"exclude_modules": ["nope"]}, "exclude_modules 'nope'"),
        ({"rank_pattern": {"q_proj": 2, "k_proj": 3}}, "rank_pattern 'k_proj'"),
        ({"alpha_pattern": {"q_porj": 2}}, "alpha_pattern 'q_porj'"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform 7"),
    ],
    ids=str,
)
def test_entries_that_match_nothing_are_unmatched(fields: dict[str, Any], unmatched: str) -> None:
    selection = select(build("llama"), **{"targets": ["q_proj"], **fields})
    assert selection.unmatched == (unmatched,)


def test_entries_that_overlap_are_all_matched() -> None:
    assert select(build("llama"), ["q_proj", "self_attn.q_proj", Q0]).unmatched == ()


def test_nothing_matched_shows_the_nearest_names() -> None:
    with pytest.raises(ak.SelectionError, match=r"'q_porj'.* matched none of the 16 .* Nearest: 'q_proj'"):
        select(build("llama"), ["q_porj"])


def test_a_regular_expression_must_match_the_whole_path() -> None:
    with pytest.raises(ak.SelectionError, match="a string is a regular expression for the full path"):
        select(build("llama"), "q_proj")


def test_everything_left_out_says_why() -> None:
    with pytest.raises(ak.SelectionError, match=r"is left out; 2 in all, for example .* leaves out layer 0"):
        select(build("llama"), ["q_proj"], layers_to_transform=[5])


def test_no_default_for_a_model_without_a_type_names_layers_to_choose_from() -> None:
    with pytest.raises(ak.SelectionError, match=r"on EmbeddingNet, which has no model_type.*'overhead'"):
        select(build("embednet"), None)


def test_a_model_without_layers_to_adapt_is_told_so() -> None:
    with pytest.raises(ak.SelectionError, match="Sequential has no layer that can be adapted"):
        select(nn.Sequential(nn.LayerNorm(2)), ["0.fc"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["norm"], "'norm', taken by target_modules 'norm', is a BatchNorm2d, which cannot be adapted"),
        (["layers"], "'layers', taken by .* a ModuleList is a container that is never called itself"),
    ],
)
def test_a_named_layer_of_no_kind_is_an_error(targets: list[str], message: str) -> None:
    with pytest.raises(ak.SelectionError, match=message):
        select(build("convnet" if targets == ["norm"] else "embednet"), targets)


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


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_malformed_regular_expression_is_a_config_error(field: str) -> None:
    with pytest.raises(ak.ConfigError, match=rf"{field} = '\(' is no valid regular expression"):
        select(build("embednet"), **{"targets": ["embed"], field.replace("target_modules", "targets"): "("})


# Shared modules


@pytest.mark.parametrize("targets", [["first"], ["second"], "second", ["first", "second"], "first|second"], ids=str)
def test_a_shared_module_is_matched_by_any_of_its_paths_once(targets: Any) -> None:
    selection = select(Shared(), targets)
    assert selection.paths == ("first",)
    assert selection.unmatched == ()


@pytest.mark.parametrize("exclude", [["second"], "second", ["first"]], ids=str)
def test_a_shared_module_is_excluded_by_any_of_its_paths(exclude: Any) -> None:
    assert select(Shared(), "all-linear", exclude_modules=exclude).paths == ("other",)


@pytest.mark.parametrize("entry", ["first", "second"])
def test_a_shared_module_is_a_head_by_any_of_its_paths(entry: str) -> None:
    selection = select(Shared(), "all-linear", modules_to_save=[entry])
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
        "2 layers adapted, 1 modules trained in full\n"
        "  embed     Embedding(32 -> 8)  by target_modules 'embed'\n"
        "  layers.0  Linear(8 -> 8)  by target_modules 'layers.0'\n"
        "  head      trained in full\n"
        "left out:\n"
        "  layers.1: exclude_modules 'layers.1'\n"
        "  head: modules_to_save trains 'head' in full\n"
        "matched nothing:\n"
        "  target_modules 'nope'\n"
        "  rank_pattern 'none'"
    )


def test_the_printed_form_names_the_default_and_the_regex() -> None:
    assert "by the default for 'gpt2': target_modules 'c_attn'" in str(select(build("gpt2"), None))
    assert r"by target_modules '.*\\.q_proj'" in str(select(build("llama"), r".*\.q_proj"))


def test_select_changes_nothing() -> None:
    model = build("bert")
    before = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    ak.select(model, LoraConfig())
    assert {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_select_works_on_the_meta_device() -> None:
    assert select(build("llama").to("meta"), "all-linear").paths == select(build("llama"), "all-linear").paths


def test_select_does_not_look_at_the_adapters_there_are() -> None:
    model = build("bert")
    before = ak.select(model, LoraConfig(target_modules="all-linear"))
    ak.attach(model).add("q_proj", LoraConfig(target_modules="all-linear", bias="all"))
    after = ak.select(model, LoraConfig(target_modules="all-linear"))
    assert (after.paths, after.heads, str(after)) == (before.paths, before.heads, str(before))


def test_a_selections_kinds_are_those_of_its_layers() -> None:
    kinds = {m.path: m.kind.name for m in select(build("convnet"), ["conv1d", "conv3d", "fc"]).targets}
    assert kinds == {"conv1d": "Conv1d", "conv3d": "Conv3d", "fc": "Linear"}


@pytest.mark.parametrize("fields", [{"layers_to_transform": [0]}, {"layers_to_transform": {"layers": [0]}}], ids=str)
def test_entry_whose_every_layer_the_numbers_leave_out_is_told(fields: dict[str, Any]) -> None:
    config = LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=None, **fields)
    with pytest.warns(ak.AdapterWarning, match="matched nothing: target_modules 'lm_head' .*'lm_head': .* in no stack"):
        report = ak.attach(build("llama")).add("a", config)
    assert report.targets == ("model.layers.0.self_attn.q_proj",)
    assert "lm_head" in str(report)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
@pytest.mark.parametrize("wrap", ["get_peft_model", "inject_adapter_in_model"])
def test_model_with_adapters_of_peft_is_refused(wrap: str, targets: Any) -> None:
    config, model = peft.LoraConfig(target_modules=["q_proj"]), build("llama")
    theirs = (
        peft.get_peft_model(model, config) if wrap.startswith("get") else peft.inject_adapter_in_model(config, model)
    )
    with pytest.raises(ak.SelectionError, match=r"adapters of PEFT, such as at '.*q_proj'\. Take them off first: "):
        ak.attach(theirs).add("a", LoraConfig(target_modules=targets))
    if wrap.startswith("get"):
        assert ak.attach(theirs.unload()).add("a", LoraConfig(target_modules=targets)).targets
