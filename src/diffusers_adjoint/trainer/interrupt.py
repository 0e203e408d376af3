"""Ctrl-C and SIGTERM during training: finish the update, write a checkpoint, and stop."""

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
    """On Ctrl-C or SIGTERM, finish the current update, write a checkpoint, and end training.

    It is a context around training and a callback of it. It then raises `KeyboardInterrupt` or `SystemExit(143)`, so that the
    rest of a script does not run as if training had finished. A second signal acts at once, as without this class.

    Args:
        accelerator: used to stop all processes after the same update, whichever process got the signal.

    Raises:
        ValueError: on entering, outside the main thread: Python delivers signals to that thread only.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._previous: dict[int, Any] = {}
        self._received = self._acted_on = 0  # signal numbers: received by this process, and agreed on by all processes

    def __enter__(self) -> SaveOnInterrupt:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("save_on_interrupt works in the main thread only; call train() there, or pass False.")
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        if error is None and self._received:
            logger.warning(f"{signal.Signals(self._received).name} arrived after training had ended; it is ignored.")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()
        logger.warning(f"{signal.Signals(number).name}: a checkpoint is written after this update; repeat it to stop at once.")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        received = torch.tensor([self._received], device=self._accelerator.device)
        self._acted_on = int(self._accelerator.gather(received).max())
        if self._acted_on:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it takes long, and with save_strategy="best" it may switch saving off

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        # Raised here rather than after training: at its end the host deletes checkpoints that are not the best.
        if self._acted_on == signal.SIGINT:
            raise KeyboardInterrupt(
                f"stopped after update {state.global_step}; train(resume_from_checkpoint=True) resumes from it"
            )
        if self._acted_on:
            raise SystemExit(128 + self._acted_on)


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Within this context `SaveOnInterrupt` is active and is one of the trainer's callbacks."""
    with SaveOnInterrupt(trainer.accelerator) as interrupt:
        trainer.add_callback(interrupt)
        try:
            yield
        finally:
            trainer.remove_callback(interrupt)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within this context SIGTERM raises `SystemExit(143)` at once, as Ctrl-C raises `KeyboardInterrupt`."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
