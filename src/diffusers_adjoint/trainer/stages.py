"""Training in stages, each from a frozen copy of the model: when one begins, and what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path

from ..model.denoiser import PipelineDenoiser
from ..model.frozen_weights import FrozenWeights

__all__ = ["begin_stage", "load_stage", "require_whole_weights", "save_stage"]

FILE_NAME = "stage_weights.safetensors"


def require_whole_weights(stages: int | None, *, divided: bool) -> None:
    """Raise ValueError if the weights that stages would keep a copy of are divided among processes, or not the trainer's own."""
    if stages is not None and divided:
        raise ValueError(f"stages={stages} keeps a copy of whole weights, which FSDP and DeepSpeed divide; use DDP.")


def begin_stage(denoiser: PipelineDenoiser, step: int, updates: int, stages: int) -> None:
    """Before an update: freeze the weights where it is the first one of a stage.

    Args:
        denoiser: whose `stage` is replaced then.
        step: updates made so far.
        updates: of the whole training.
        stages: equally long, as far as whole updates can be.

    Raises:
        ValueError: if the weights frozen last are neither this stage's nor those of the one before.
    """
    stage = step * stages // updates
    last = -1 if denoiser.stage is None else denoiser.stage.stage
    if stage == last:
        return
    if stage != last + 1:
        raise ValueError(
            f"after {step} of {updates} updates training is in stage {stage + 1} of {stages}, but its weights were last frozen "
            f"in stage {last + 1}; resume with the max_steps and stages of before, or make a new trainer to start anew."
        )
    denoiser.stage = FrozenWeights(denoiser.network, stage)


def save_stage(denoiser: PipelineDenoiser, folder: Path) -> None:
    """Into a checkpoint, if there are stages."""
    if denoiser.stage is not None:
        denoiser.stage.save(folder / FILE_NAME)


def load_stage(denoiser: PipelineDenoiser, folder: Path) -> None:
    """What `save_stage` wrote; raises ValueError if it is missing."""
    denoiser.stage = FrozenWeights.load(denoiser.network, folder / FILE_NAME)
