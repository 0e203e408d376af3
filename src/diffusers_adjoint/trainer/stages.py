"""Training in stages (Tilt Matching): each stage uses a frozen copy of the model from its start, which checkpoints keep."""

from __future__ import annotations

from pathlib import Path

from ..model.denoiser import PipelineDenoiser
from ..model.frozen_weights import FrozenWeights

__all__ = ["begin_stage", "load_stage", "require_whole_weights", "save_stage"]

FILE_NAME = "stage_weights.safetensors"


def require_whole_weights(stages: int | None, *, divided: bool) -> None:
    """Raise ValueError if stages are asked for and the weights, which they copy, are divided among processes."""
    if stages is not None and divided:
        raise ValueError(f"stages={stages} copies whole weights, which FSDP and DeepSpeed divide among processes; use DDP.")


def begin_stage(denoiser: PipelineDenoiser, step: int, updates: int, stages: int) -> None:
    """Before the first update of a stage, replace `denoiser.stage` by a frozen copy of the weights.

    Args:
        denoiser: with the trained network.
        step: updates made so far.
        updates: updates of the whole training.
        stages: number of stages, of equal length up to one update.

    Raises:
        ValueError: if the last frozen copy belongs neither to this stage nor to the one before.
    """
    stage = step * stages // updates
    last = -1 if denoiser.stage is None else denoiser.stage.stage
    if stage == last:
        return
    if stage != last + 1:
        raise ValueError(
            f"after {step} of {updates} updates training is in stage {stage + 1} of {stages}, but its weights were last frozen "
            f"in stage {last + 1}; resume with the same max_steps and stages as before, or make a new trainer to start again."
        )
    denoiser.stage = FrozenWeights(denoiser.network, stage)


def save_stage(denoiser: PipelineDenoiser, folder: Path) -> None:
    """Write the frozen copy of the current stage into a checkpoint, if there is one."""
    if denoiser.stage is not None:
        denoiser.stage.save(folder / FILE_NAME)


def load_stage(denoiser: PipelineDenoiser, folder: Path) -> None:
    """Read what `save_stage` wrote; raises ValueError if it is missing."""
    denoiser.stage = FrozenWeights.load(denoiser.network, folder / FILE_NAME)
