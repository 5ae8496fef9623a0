"""A way to combine that is not adapterkit's own: spherical linear interpolation of two adapters.

`pip install` this folder, and `adapters.combine("c", {"a": 0.5, "b": 0.5}, method="slerp")` works.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

import adapterkit as ak


def slerp(stack: Tensor, weights: Tensor, options: ak.CombinerOptions) -> Tensor:
    """Along the arc between two changes, as vectors: `sin((1 - t) a) X / sin a + sin(t a) Y / sin a`.

    `a` is the angle between them and `t` the second's share of the weights. Unlike the straight line it does not
    shorten changes that point in different directions (Shoemake 1985). Where there is no arc to be known, because
    one is zero or the angle is too near to 0 or 180 degrees, it is the straight line.

    Args:
        stack: `(2, out, in)`.
        weights: `(2,)`; only their ratio counts.
    """
    if len(stack) != 2 or float(weights.sum()) == 0.0:
        raise ak.ConfigError("slerp goes from one adapter to another: it needs two, with weights above 0.")
    first, second = stack
    share = weights.to(stack)[1] / weights.to(stack).sum()
    cosine = (first * second).sum() / (first.norm() * second.norm()).clamp(min=torch.finfo(stack.dtype).tiny)
    angle = cosine.clamp(-1.0, 1.0).acos()
    if float(angle.sin()) < 1e-4 or not (first.any() and second.any()):
        return torch.lerp(first, second, share)
    arc = ((1 - share) * angle).sin() * first + (share * angle).sin() * second
    result: Tensor = arc / angle.sin()
    return result


@ak.hookimpl
def combiners() -> Mapping[str, ak.Combiner]:
    """See adapterkit's hook specifications."""
    # Inner products do not change when both changes are turned, so it may be worked out in a small common basis.
    return {"slerp": ak.Combiner(slerp, rotates=True)}
