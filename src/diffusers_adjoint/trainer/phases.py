"""Wall-clock time of each phase of an update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Phases"]

REST = "rest"


class Phases:
    """Seconds of one update by phase. In nested phases the innermost one counts. Measures between `begin` and `end` only.

    Args:
        device: a CUDA device is synchronised at each change of phase, because it runs asynchronously.

    Attributes:
        seconds: phase → seconds, in the order in which the phases began; "rest", the time outside of any phase, is last.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    def begin(self) -> None:
        """Start measuring, at the start of the update."""
        self._wait()
        self._open, self._since = [REST], time.perf_counter()

    def end(self) -> None:
        """Stop measuring, at the end of the update."""
        self._count()
        self._open = []
        self.seconds[REST] = self.seconds.pop(REST)  # moves it to the end

    @property
    def measuring(self) -> bool:
        """Whether `begin` was called and `end` was not."""
        return bool(self._open)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Within this context time counts for the phase `name`."""
        if not self._open:
            yield
            return
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        self._wait()
        now = time.perf_counter()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
