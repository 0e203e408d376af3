"""Explain an error of the pipeline during the start check: whether the call, the scheduler or the replay caused it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .conditioning import copied
from .pipeline import PipelineReplay

__all__ = ["ONE_SAMPLE", "errors_explained", "refusal", "said"]

ONE_SAMPLE = "use per_device_train_batch_size=1, per_device_eval_batch_size=1 and num_generations=1"


@contextmanager
def errors_explained(replay: PipelineReplay, columns: dict[str, list[Any]], generators: list[torch.Generator]) -> Iterator[None]:
    """Within this context what the pipeline raises becomes a ValueError that says where it comes from and what to do.

    Args:
        columns, generators: the batch of the check. Copies of the generators are used.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, ValueError) and replay.name in str(error) and _is_the_replays(error)
        if told or isinstance(error, torch.OutOfMemoryError):
            raise
        raise refusal(replay, *_explanation(replay, columns, generators, said(error))) from error


def refusal(replay: PipelineReplay, broken: str, way_out: str) -> ValueError:
    return ValueError(f"{replay.name} cannot be trained, because it {broken}; {way_out}.")


def said(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('.')}"


def _explanation(
    replay: PipelineReplay, columns: dict[str, list[Any]], generators: list[torch.Generator], raised: str
) -> tuple[str, str]:
    """(what is broken, the way out), found by running the pipeline's own call with its own scheduler, then with ours."""
    if _fails(lambda: replay.sample(columns, copied(generators))):
        first = {name: rows[:1] for name, rows in columns.items()}
        if len(generators) > 1 and not _fails(lambda: replay.sample(first, copied(generators[:1]))):
            return f"takes one sample at a time, not {len(generators)} ({raised})", ONE_SAMPLE
        if absent := replay.not_loaded(columns):
            return (
                f"fails in its own call too ({raised}), where {', '.join(absent)} are not loaded",
                "call load_components() before",
            )
        return f"fails in its own call too ({raised})", "fix pipeline_kwargs or the dataset's columns"
    if _fails(lambda: replay.memoryless_sample(columns, copied(generators))):
        own, memoryless = type(replay.pipeline.scheduler).__name__, type(replay.scheduler).__name__
        return (
            f"asks of its scheduler what its {own} does and the {memoryless} that trains it does not ({raised})",
            "change or leave out the argument that asks for it, or use another pipeline class of the same model",
        )
    return f"fails in its replay, not in its own call ({raised})", "pass a pipeline whose call loops and decodes as others do"


def _fails(call: Callable[[], Any]) -> bool:
    try:
        with torch.no_grad():
            call()
    except Exception:
        return True
    return False


def _is_the_replays(error: BaseException) -> bool:
    """Whether the replay raised it: pipelines, too, name themselves in their errors."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).parent == Path(__file__).parent
