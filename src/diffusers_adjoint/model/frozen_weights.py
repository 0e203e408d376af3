"""A frozen copy of the trained weights, which can replace them for a while: an earlier model beside the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["FrozenWeights"]


class FrozenWeights:
    """A copy of a network's trained weights (an adapter's, or all) at the beginning of a stage.

    Args:
        network: the trained weights are those that require a gradient; they must be whole on each process.
        stage: number of the stage, from 0.
    """

    def __init__(self, network: nn.Module, stage: int) -> None:
        self.stage = stage
        self._trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._frozen = {name: p.detach().clone() for name, p in self._trained.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the network has the frozen weights; its own are restored exactly afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for name, parameter in self._trained.items():
                own = parameter.clone()
                parameter.copy_(self._frozen[name])
                self._frozen[name].copy_(own)
        torch.clear_autocast_cache()  # autocast caches casts of weights, and does not notice that these have changed

    def save(self, file: Path) -> None:
        """Write the frozen weights and the stage's number."""
        save_file({name: value.contiguous() for name, value in self._frozen.items()}, file, {"stage": str(self.stage)})

    @classmethod
    def load(cls, network: nn.Module, file: Path) -> FrozenWeights:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is missing or does not fit the network.
        """
        if not file.is_file():
            raise ValueError(
                f"{file.parent} holds no {file.name}; pass a checkpoint of a run with the same stages and without "
                f"save_only_model."
            )
        with safe_open(file, "pt") as saved:
            found = cls(network, int(saved.metadata()["stage"]))
        weights = load_file(file)
        if {name: p.shape for name, p in weights.items()} != {name: p.shape for name, p in found._frozen.items()}:
            raise ValueError(f"{file} does not fit the trained weights; resume with the peft_config it was trained with.")
        for name, value in found._frozen.items():
            value.copy_(weights[name])
        return found
