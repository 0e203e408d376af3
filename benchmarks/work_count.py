"""Count network evaluations, weighted by what they are used for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class WorkCount:
    """Evaluations within `counting`, a sample: 1 for a forward, 2 with a VJP to the state, 3 with a backward pass to weights.

    What an evaluation is for is seen by its graph: none, one that starts at the state, or one that starts at weights alone. An
    evaluation with graph counts as differentiated, which is so of all that training makes.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self.total = 0
        self._active = False
        for network in networks:
            network.register_forward_hook(self._count, with_kwargs=True)

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _count(self, network: nn.Module, arguments: Any, options: Any, output: Any) -> None:
        if not self._active:
            return
        made = tensors(output)
        to_state = any(x.requires_grad for x in tensors((arguments, options)))
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in made)
        self.total += len(made[0]) * ((2 if to_state else 3) if differentiated else 1)


def tensors(nested: Any) -> list[Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]
