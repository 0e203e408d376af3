"""What one call of `train` counts: its updates, evaluations of the network, and measurements between two lines of the log."""

from __future__ import annotations

import time

from accelerate import Accelerator

from ..model.denoiser import PipelineDenoiser
from .sample_log import SampleLog
from .updates import Updates

__all__ = ["Counts", "Rate"]


class Rate:
    """How fast the network is evaluated between two lines of the log.

    Args:
        denoiser: counts its evaluations, one an image and step.
        processes: of which each makes as many.
    """

    def __init__(self, denoiser: PipelineDenoiser, processes: int) -> None:
        self._denoiser = denoiser
        self._processes = processes
        self._seconds, self._evaluations = time.perf_counter(), denoiser.evaluations  # at the last line, or at the start

    def since_last(self) -> float:
        """Evaluations a second of all processes since the last call, or since this was made."""
        seconds, evaluations = time.perf_counter(), self._denoiser.evaluations
        rate = (evaluations - self._evaluations) / (seconds - self._seconds) * self._processes
        self._seconds, self._evaluations = seconds, evaluations
        return rate


class Counts:
    """All of them, made anew for each call of `train`: what a call has left that an error has ended is forgotten.

    Attributes:
        updates: the one under way, and how many there were.
        samples: measurements since the last line of the log.
        rate: of evaluations since then.
    """

    def __init__(self, accelerator: Accelerator, denoiser: PipelineDenoiser) -> None:
        self.updates = Updates(accelerator)
        self.samples = SampleLog()
        self.rate = Rate(denoiser, accelerator.num_processes)
