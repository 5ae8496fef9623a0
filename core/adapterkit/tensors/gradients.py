"""Switching `requires_grad` on and off without breaking graphs that wait for their backward.

A backward gives no gradient to a parameter if `requires_grad` is off by then, even if the forward recorded it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_MARK = "adapterkit"


def enable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Switch `requires_grad` on.

    Returns:
        The parameters for which it was off.
    """
    changed = [p for p in parameters if not p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(True)
    return changed


def disable(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Switch `requires_grad` off, except for parameters that a graph still holds.

    Returns:
        The parameters that changed, and those that a graph holds.
    """
    changed: list[nn.Parameter] = []
    held: list[nn.Parameter] = []
    with torch.inference_mode(False), torch.enable_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                (held if _in_graph(parameter) else changed).append(parameter)
    for parameter in changed:
        parameter.requires_grad_(False)
    return changed, held


def _in_graph(parameter: nn.Parameter) -> bool:
    """Whether a graph holds this parameter.

    The node that accumulates a parameter's gradient is made on request and freed at once unless a graph holds it. So a
    mark that is set on the node is found again only if a graph holds it.
    """
    if parameter.is_inference():  # no graph can hold it
        return False
    _accumulator(parameter).metadata[_MARK] = True
    return bool(_accumulator(parameter).metadata.pop(_MARK, False))


def _accumulator(parameter: nn.Parameter) -> Any:
    node: Any = parameter.view_as(parameter).grad_fn
    return node.next_functions[0][0]
