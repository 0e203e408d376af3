"""How long each part of an update takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Phases"]

REST = "rest"


class Phases:
    """Seconds of one update by phase, each second in the innermost phase; before `begin` and after `end` nothing is measured.

    Args:
        device: which is waited for at each change of phase, since it works on while Python goes ahead.

    Attributes:
        seconds: phase → seconds, in the order in which they began; last "rest", which is in no phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    def begin(self) -> None:
        """At the start of the update."""
        self._wait()
        self._open, self._since = [REST], time.perf_counter()

    def end(self) -> None:
        """At its end."""
        self._count()
        self._open = []
        self.seconds[REST] = self.seconds.pop(REST)  # named last

    @property
    def measuring(self) -> bool:
        """Whether the update is under way."""
        return bool(self._open)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Around a phase."""
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
