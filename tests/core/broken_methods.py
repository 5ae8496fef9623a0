"""Methods that each break one sentence of the contract, for the test kit's own test.

Each is the outer product `dW = u v^T` with one thing wrong. They are at module level, so that the models they
are on can be pickled.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class OuterConfig(ak.AdapterConfig):
    method = "broken_outer"

    scale: float = 0.5


class OuterLayer(ak.LowRankLayer):
    def setup(self, target: ak.Target, config: OuterConfig) -> None:
        self.outer_u = target.new(target.out_features)
        self.outer_v = target.new(target.in_features, init=nn.init.normal_)

    def factors(self) -> ak.Factors:
        return ak.Factors(self.config.scale * self.outer_u[:, None], self.outer_v[None, :])


class Outer(ak.Plugin):
    """The method as it should be; the broken ones change one thing of it."""

    config, layer, prefix = OuterConfig, OuterLayer, "outer_"


class WrongPrefix(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            if target.kind.lookup:
                self.embedding_outer_u = self.outer_u
                del self.outer_u


class MergedLayer(ak.AdapterLayer):
    """The same change, given by `merged` and `forward`."""

    setup = OuterLayer.setup

    def dense(self):
        return OuterLayer.factors(self).delta()

    def merged(self, weight, bias):
        return weight + self.dense(), bias

    def forward(self, base, x):
        return base(x) + self.kind.apply(x, OuterLayer.factors(self))


class ImpureMerge(Outer):
    class layer(MergedLayer):
        def merged(self, weight, bias):
            weight += self.dense()
            return weight, bias


class MergeChangesTheAdapter(Outer):
    class layer(MergedLayer):
        def merged(self, weight, bias):
            merged = super().merged(weight, bias)
            self.outer_u.mul_(2)
            return merged


class MergeGivesTheWeightAlone(Outer):
    class layer(MergedLayer):
        def merged(self, weight, bias):
            return weight + self.dense()


class AddsInPlace(Outer):
    class layer(MergedLayer):
        def forward(self, base, x):
            out = base(x)
            out += self.kind.apply(x, OuterLayer.factors(self))
            return out


class ForwardGivesNothing(Outer):
    class layer(MergedLayer):
        def forward(self, base, x):
            super().forward(base, x)


class ForwardAloneGivesNothing(Outer):
    class layer(ak.AdapterLayer):
        setup = OuterLayer.setup

        def forward(self, base, x):
            base(x)


class SharedForwardGivesNothing(Outer):
    class shared(ak.Shared):
        def forward(self, base, *args, **kwargs):
            base(*args, **kwargs)


class ForgottenScale(Outer):
    class layer(OuterLayer):
        def forward(self, base, x):
            return base(x) + self.kind.apply(x, self.factors()) / self.config.scale


class WritesToTheBase(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            self.module = [target.module]

        def forward(self, base, x):
            self.module[0].weight.data.mul_(1.01)  # behind autograd's back
            return base(x) + self.kind.apply(x, self.factors())


class SharedOuter(Outer):
    """With a shared vector in place of v, and integers that choose its entries; right as it is."""

    class shared(ak.Shared):
        def setup(self, targets, config, root):
            widest = max(t.in_features for t in targets)
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("outer_all", torch.randn(widest, generator=generator).to(root.dtype))
            self.register_buffer("outer_order", torch.arange(widest).flip(0))

    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            del self.outer_v
            self.register_buffer("outer_places", torch.arange(target.in_features).flip(0))

        def vector(self):
            return self.shared.outer_all

        def factors(self):
            vector = self.vector()[self.shared.outer_order][self.outer_places]
            return ak.Factors(self.config.scale * self.outer_u[:, None], vector[None])


class AllShared(Outer):
    """All vectors are parts of two shared ones, and the layers have no parameters; right as it is."""

    class shared(ak.Shared):
        def setup(self, targets, config, root):
            widest = max(max(t.out_features, t.in_features) for t in targets)
            self.outer_bank = nn.ParameterList([root.new(widest), root.new(widest, init=nn.init.normal_)])

    class layer(ak.LowRankLayer):
        def factors(self):
            u, v = self.shared.outer_bank
            return ak.Factors(self.config.scale * u[: self.kind.out_features, None], v[None, : self.kind.in_features])


class SharedTensorCopied(SharedOuter):
    class layer(SharedOuter.layer):
        def setup(self, target, config):
            super().setup(target, config)
            self.copied = SimpleNamespace(value=self.shared.outer_all.clone())

        def vector(self):
            return self.copied.value.to(self.outer_u.dtype)


class DependsOnTheOrder(Outer):
    class layer(OuterLayer):
        last: ClassVar[Any] = None

        def setup(self, target, config):
            super().setup(target, config)
            self.path = target.path

        def forward(self, base, x):
            out, here = base(x), (self.path, x.data_ptr())
            second = DependsOnTheOrder.layer.last == here
            DependsOnTheOrder.layer.last = here
            return out + self.kind.apply(x, self.factors()) * (0.5 if second else 1.0)


class BufferNotSaved(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            self.register_buffer("outer_gain", torch.rand((), dtype=target.dtype), persistent=False)

        def factors(self):
            right = super().factors()
            return ak.Factors(right.up * self.outer_gain, right.down)


class NotPicklable(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            self.of: Callable[[Tensor], Tensor] = lambda x: x

        def factors(self):
            return ak.Factors(self.of(super().factors().up), self.outer_v[None, :])


class BreaksTheGraph(Outer):
    class layer(OuterLayer):
        def factors(self):
            torch._dynamo.graph_break()
            return super().factors()


class WrongExempt(Outer):
    def key_rule(self, config):
        return ak.KeyRule(prefix="outer_", exempt=frozenset({"outer_u"}))


class InventsWhatIsMissing(Outer):
    def from_file(self, config, tensors):
        found = dict(tensors)
        for path in {key.rpartition(".")[0] for key in tensors}:
            found.setdefault(f"{path}.outer_u", torch.zeros(1))
            found.setdefault(f"{path}.outer_v", tensors[f"{path}.outer_u"].clone())
            if f"{path}.outer_u" not in tensors:
                found[f"{path}.outer_u"] = torch.zeros_like(tensors[f"{path}.outer_v"])
        return config, found


class TensorThatIsNoBuffer(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            self.half = SimpleNamespace(value=torch.full((1, 1), 0.5, dtype=target.dtype))

        def factors(self):
            right = super().factors()
            return right._replace(up=right.up @ self.half.value)


class NotTheIdentity(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            if target.file is None:
                nn.init.ones_(self.outer_u)


class LeavesAHook(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            target.module.register_forward_hook(_nothing)


def _nothing(module: nn.Module, args: object, output: object) -> None:
    return None


class OneParameterForAll(Outer):
    class layer(OuterLayer):
        all_of: ClassVar[weakref.WeakKeyDictionary[nn.Module, nn.Parameter]] = weakref.WeakKeyDictionary()

        def setup(self, target, config):
            super().setup(target, config)
            self.outer_u = OneParameterForAll.layer.all_of.setdefault(target.module, self.outer_u)


@dataclass(frozen=True, kw_only=True)
class GrowingConfig(OuterConfig):
    def check(self) -> None:
        object.__setattr__(self, "scale", self.scale * 2)


class ConfigChangesInJson(Outer):
    config = GrowingConfig


class DependsOnTheWeight(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            self.module = [target.module]

        def factors(self):
            right = super().factors()
            norm = self.module[0].weight.detach().norm().to(right.up.dtype)
            return ak.Factors(right.up * norm, right.down)


class CopiesItselfNot(Outer):
    class layer(OuterLayer):
        def __deepcopy__(self, memo):
            return self


class TrainsNothing(Outer):
    class layer(OuterLayer):
        def factors(self):
            right = super().factors()
            return ak.Factors(right.up, right.down.detach())


class SavesTooMuch(Outer):
    def to_file(self, config, tensors):
        return config, {**tensors, "rest.weight": torch.zeros(2)}


class TellsOtherLayers(Outer):
    def sizes(self, tensors):
        return len(tensors["outer_v"]), len(tensors["outer_u"])


class FactorsGiveNothing(Outer):
    class layer(OuterLayer):
        def factors(self):
            super().factors()


class UpAndDownSwapped(Outer):
    class layer(OuterLayer):
        def factors(self):
            right = super().factors()
            return ak.Factors(right.down.t(), right.up.t())


class KeepsItsFactors(Outer):
    class layer(OuterLayer):
        def factors(self):
            if not hasattr(self, "kept"):
                self.kept = super().factors()
            return self.kept


class ParametersOfAnotherDtype(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            self.outer_u = nn.Parameter(torch.zeros(target.out_features))


class ScaleForgottenEverywhere(Outer):
    class layer(OuterLayer):
        def factors(self):
            return ak.Factors(self.outer_u[:, None], self.outer_v[None, :])


class FewTokensGiveMore(Outer):
    class layer(ak.DenseLayer):
        setup = OuterLayer.setup

        def change(self):
            return OuterLayer.factors(self).delta()

        def few(self, x):
            return x @ self.change().t() / self.config.scale


class BranchesOnAValue(Outer):
    class layer(OuterLayer):
        def factors(self):
            right = super().factors()
            return right if bool(self.outer_u.isfinite().all()) else ak.Factors(right.up * 0, right.down)


class RemembersANumber(Outer):
    class shared(ak.Shared):
        def setup(self, targets, config, root):
            self.seen = 0

        def step(self, number, layers):
            self.seen += 1
            for layer in layers.values():
                layer.outer_u.data.mul_(self.seen)


class DrawsElsewhere(Outer):
    class layer(OuterLayer):
        def setup(self, target, config):
            super().setup(target, config)
            self.outer_v = target.new(target.in_features, init=1.0 + next(NUMBERS) % 5 / 10)


NUMBERS = itertools.count()


class DropsByItself(Outer):
    class layer(OuterLayer):
        def factors(self):
            right = super().factors()
            return right._replace(up=nn.functional.dropout(right.up, 0.5, self.training))


class ForgetsTheScaleOfFactors(Outer):
    def from_factors(self, factors, kinds):
        found = {}
        for path, f in factors.items():
            u, _, vh = torch.linalg.svd(f.delta())
            found |= {f"{path}.outer_u": u[:, 0], f"{path}.outer_v": vh[0]}
        return OuterConfig(), found


class NamesNoUpFactor(Outer):
    class layer(OuterLayer):
        up_factor = ("outer_up",)


class OneParameterForAllSizes(Outer):
    class layer(OuterLayer):
        all_of: ClassVar[dict[object, nn.Parameter]] = {}

        def setup(self, target, config):
            super().setup(target, config)
            if target.file is None:
                self.outer_u = self.all_of.setdefault((target.out_features, target.dtype), self.outer_u)


class TellsAnotherRank(Outer):
    class layer(ak.DenseLayer):
        rank = 2
        setup = OuterLayer.setup
        factors = OuterLayer.factors

        def change(self):
            return self.factors().delta()


BROKEN: dict[type[Outer], str] = {
    ConfigChangesInJson: "check_config_survives_json",
    WrongPrefix: "check_parameters",
    ParametersOfAnotherDtype: "check_parameters",
    FactorsGiveNothing: "check_parameters",
    UpAndDownSwapped: "check_parameters",
    MergeGivesTheWeightAlone: "check_parameters",
    NamesNoUpFactor: "check_parameters",
    OneParameterForAllSizes: "check_parameters",
    ForwardGivesNothing: "check_mathematics_is_pure",
    ForwardAloneGivesNothing: "check_mathematics_is_pure",
    SharedForwardGivesNothing: "check_every_claimed_layer_kind",
    KeepsItsFactors: "check_mathematics_is_pure",
    DropsByItself: "check_mathematics_is_pure",
    BranchesOnAValue: "check_mathematics_is_pure",
    ImpureMerge: "check_mathematics_is_pure",
    MergeChangesTheAdapter: "check_mathematics_is_pure",
    AddsInPlace: "check_mathematics_is_pure",
    TrainsNothing: "check_every_claimed_layer_kind",
    SharedTensorCopied: "check_shared_tensors_are_one_copy",
    ScaleForgottenEverywhere: "check_given_fields_act",
    NotTheIdentity: "check_identity_at_initialisation",
    WritesToTheBase: "check_base_is_untouched",
    ForgottenScale: "check_merged_equals_adapted",
    DependsOnTheWeight: "check_merge_is_linear",
    FewTokensGiveMore: "check_dense_forms_agree",
    TellsAnotherRank: "check_dense_forms_agree",
    ForgetsTheScaleOfFactors: "check_known_changes_become_adapters",
    DependsOnTheOrder: "check_order_does_not_matter",
    BufferNotSaved: "check_save_load_is_identity",
    SavesTooMuch: "check_file_has_exactly_its_keys",
    WrongExempt: "check_only_exempt_keys_may_be_absent",
    InventsWhatIsMissing: "check_only_exempt_keys_may_be_absent",
    TellsOtherLayers: "check_files_tell_the_layers",
    TensorThatIsNoBuffer: "check_moves_to_dtype",
    RemembersANumber: "check_training_goes_on",
    DrawsElsewhere: "check_reset_begins_again",
    CopiesItselfNot: "check_deepcopy_is_independent",
    NotPicklable: "check_pickles",
    BreaksTheGraph: "check_compiles",
    LeavesAHook: "check_detach_restores",
    OneParameterForAll: "check_two_adapters_of_one_method",
}
