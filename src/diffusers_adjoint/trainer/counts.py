"""Counters of one call of `train`: updates, network evaluations, and measurements between two log lines."""

from __future__ import annotations

import time

from accelerate import Accelerator

from ..model.denoiser import PipelineDenoiser
from .sample_log import SampleLog
from .updates import Updates

__all__ = ["Counts", "Rate"]


class Rate:
    """Network evaluations per second between two log lines.

    Args:
        denoiser: its `evaluations` are read.
        processes: number of processes; each is taken to make as many evaluations as this one.
    """

    def __init__(self, denoiser: PipelineDenoiser, processes: int) -> None:
        self._denoiser = denoiser
        self._processes = processes
        self._seconds, self._evaluations = time.perf_counter(), denoiser.evaluations  # at the last log line, or at the start

    def since_last(self) -> float:
        """Evaluations per second of all processes since the last call, or since this object was made."""
        seconds, evaluations = time.perf_counter(), self._denoiser.evaluations
        rate = (evaluations - self._evaluations) / (seconds - self._seconds) * self._processes
        self._seconds, self._evaluations = seconds, evaluations
        return rate


class Counts:
    """All counters of one call of `train`. Each call makes new ones, so nothing is left of a call that ended in an error.

    Attributes:
        updates: the current update, and how many were made.
        samples: measurements since the last log line.
        rate: network evaluations per second since the last log line.
    """

    def __init__(self, accelerator: Accelerator, denoiser: PipelineDenoiser) -> None:
        self.updates = Updates(accelerator)
        self.samples = SampleLog()
        self.rate = Rate(denoiser, accelerator.num_processes)
