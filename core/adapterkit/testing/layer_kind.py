"""A layer kind says what its layer computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import default_registry
from adapterkit.kinds import Factors
from adapterkit.testing.case import Broken, expect, expect_close
from adapterkit.testing.kit import CheckFailure


@torch.no_grad()
def check_kind(layer: nn.Module, inputs: Tensor) -> None:
    """Check the layer kind of a layer, which an extension or the library has for it.

    The kind's sizes are those of `read`; `apply_weight` computes what the layer computes, with the weight of `read` and
    with one that `write` wrote; `apply` gives for factors what `apply_weight` gives for their product; `write` changes
    the tensors that `held` names, and no other; and the layer itself is left as it was.

    Args:
        inputs: what the layer is called with.

    Raises:
        CheckFailure: says which of these does not hold.
    """
    kind: Any = default_registry.kind_of(layer)
    try:
        expect(kind is not None, "no layer kind takes it: register its extension first (ak.extend).")
        _check(kind, copy.deepcopy(layer).eval(), inputs)
    except Broken as error:
        raise CheckFailure(f"check_kind failed for a {type(layer).__name__}, {kind}: {error}") from error


def _check(kind: Any, layer: Any, inputs: Tensor) -> None:
    size, bias = (kind.out_features, kind.in_features), getattr(layer, "bias", None)

    def run() -> Tensor:
        return layer(inputs)  # type: ignore[no-any-return]

    weight, plain = kind.read(layer).clone(), run()
    expect(tuple(weight.shape) == size, f"read: expected the shape (out, in) = {size}, found {tuple(weight.shape)}.")
    expect_close(kind.apply_weight(inputs, weight, bias), plain, "apply_weight, with the weight of read")
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(n, generator=generator).to(weight) for n in ((size[0], 2), (2, size[1])))
    factors = Factors(up.reshape(kind.up_shape(2)), down.reshape(kind.down_shape(2)))
    expect_close(kind.apply(inputs, factors), kind.apply_weight(inputs, up @ down), "apply, of factors")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    kind.write(layer, weight + up @ down)
    after = layer.state_dict()
    odd = [name for name, old in before.items() if not torch.equal(after[name], old) and name not in kind.held(layer)]
    expect(not odd, f"write: expected it to change {kind.held(layer)}, which held names; it changed {odd[:1]}.")
    expect_close(kind.read(layer), weight + up @ down, "read, of what write wrote")
    expect_close(run(), kind.apply_weight(inputs, weight + up @ down, bias), "the layer, with what write wrote")
