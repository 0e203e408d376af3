"""A frozen copy of what is trained, put in its place for a while: a former model beside the one in training."""

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
    """The trained weights of a network as they were in the beginning of a stage: an adapter's, or all of them.

    Args:
        network: with its trained weights, which alone require a gradient, whole on each process.
        stage: its number, from 0.
    """

    def __init__(self, network: nn.Module, stage: int) -> None:
        self.stage = stage
        self._trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._frozen = {name: p.detach().clone() for name, p in self._trained.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the network has the frozen weights, and afterwards its own, bit for bit."""
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
        torch.clear_autocast_cache()  # it holds casts of weights and would not see that these have changed

    def save(self, file: Path) -> None:
        """All weights and the stage's number."""
        save_file({name: value.contiguous() for name, value in self._frozen.items()}, file, {"stage": str(self.stage)})

    @classmethod
    def load(cls, network: nn.Module, file: Path) -> FrozenWeights:
        """What `save` wrote, of this network.

        Raises:
            ValueError: if the file is missing or of other weights.
        """
        if not file.is_file():
            raise ValueError(
                f"{file.parent} holds no {file.name}; pass a checkpoint that a run with the same stages wrote, without "
                f"save_only_model."
            )
        with safe_open(file, "pt") as saved:
            found = cls(network, int(saved.metadata()["stage"]))
        weights = load_file(file)
        if {name: p.shape for name, p in weights.items()} != {name: p.shape for name, p in found._frozen.items()}:
            raise ValueError(f"{file} does not fit the weights in training; resume with the peft_config it was trained with.")
        for name, value in found._frozen.items():
            value.copy_(weights[name])
        return found
