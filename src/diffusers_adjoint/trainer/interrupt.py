"""What happens between two updates of training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.utils import logging

__all__ = ["SaveOnInterrupt", "exit_on_sigterm", "interruptible"]

logger = logging.get_logger(__name__)


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM: the update under way is finished, a checkpoint is written, and training ends.

    Used as a context around training, which it leaves by `KeyboardInterrupt` or `SystemExit(143)`, so that what follows in a
    script does not take an interrupted run for a finished one. The second signal acts at once, as if this were not here.

    Args:
        accelerator: training stops on all processes at the same update, whichever one got the signal.

    Raises:
        ValueError: on entering, outside the main thread, which alone gets signals.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._previous: dict[int, Any] = {}
        self._received = self._acted_on = 0  # number of the signal: this process's, and what all of them agreed on

    def __enter__(self) -> SaveOnInterrupt:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("save_on_interrupt works in the main thread only; call train() there, or pass False.")
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        if error is None and self._received:  # after the last update: what was asked for is done anyway
            logger.warning(f"{signal.Signals(self._received).name} came when training was over, and is passed over.")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()
        logger.warning(f"{signal.Signals(number).name}: a checkpoint is written after this update; again to stop at once.")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        received = torch.tensor([self._received], device=self._accelerator.device)
        self._acted_on = int(self._accelerator.gather(received).max())
        if self._acted_on:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it would take its time, and may decide against saving

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        # Here, because the host's end of training deletes checkpoints that are not the best.
        if self._acted_on == signal.SIGINT:
            raise KeyboardInterrupt(
                f"stopped after update {state.global_step}; train(resume_from_checkpoint=True) goes on from it"
            )
        if self._acted_on:
            raise SystemExit(128 + self._acted_on)


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """`SaveOnInterrupt` around a trainer's training, as one of its callbacks."""
    with SaveOnInterrupt(trainer.accelerator) as interrupt:
        trainer.add_callback(interrupt)
        try:
            yield
        finally:
            trainer.remove_callback(interrupt)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within this context SIGTERM raises `SystemExit(143)` where it comes, as Ctrl-C raises `KeyboardInterrupt`."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
