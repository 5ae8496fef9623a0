"""Gradients: letting parameters require them, and not, without breaking the graphs that wait for their backward.

A backward gives no gradient to a parameter that does not require one by then, whatever was so in the forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_MARK = "adapterkit"


def light(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Let parameters require gradients; those that did not."""
    dark = [p for p in parameters if not p.requires_grad]
    for parameter in dark:
        parameter.requires_grad_(True)
    return dark


def dim(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Let parameters require no gradients, but for those that some graph holds; those that do not now, and the rest."""
    done: list[nn.Parameter] = []
    held: list[nn.Parameter] = []
    with torch.inference_mode(False), torch.enable_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                (held if _in_graph(parameter) else done).append(parameter)
    for parameter in done:
        parameter.requires_grad_(False)
    return done, held


def _in_graph(parameter: nn.Parameter) -> bool:
    """Whether a graph holds this leaf.

    The node that accumulates its gradient is made when it is asked for, and dies at once unless a graph holds it. So
    a mark is found again only on a node that lives on.
    """
    if parameter.is_inference():  # no graph can hold it
        return False
    _accumulator(parameter).metadata[_MARK] = True
    return bool(_accumulator(parameter).metadata.pop(_MARK, False))


def _accumulator(parameter: nn.Parameter) -> Any:
    node: Any = parameter.view_as(parameter).grad_fn
    return node.next_functions[0][0]
