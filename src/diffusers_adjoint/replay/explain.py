"""Explain an error of the pipeline during the start check. The cause is the pipeline's own call, the scheduler or the replay."""

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
    """A context that turns an error of the pipeline into a ValueError that says where it comes from and what to do.

    Out-of-memory errors pass unchanged, as do ValueErrors of the replay that already name the pipeline.

    Args:
        replay: the replay that is checked.
        columns: name of a column → B values; the batch of the check.
        generators: the B generators of the batch. Copies are used, so their states do not change.

    Raises:
        ValueError: instead of any other error in the context, which becomes its cause.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, ValueError) and replay.name in str(error) and _is_the_replays(error)
        if told or isinstance(error, torch.OutOfMemoryError):
            raise
        raise refusal(replay, *_explanation(replay, columns, generators, said(error))) from error


def refusal(replay: PipelineReplay, broken: str, way_out: str) -> ValueError:
    """The error for a pipeline that cannot be trained.

    Args:
        replay: the replay of the pipeline, for its name.
        broken: what is wrong, as a verb phrase that follows "because it".
        way_out: what to do instead, in the imperative.
    """
    return ValueError(f"{replay.name} cannot be trained, because it {broken}; {way_out}.")


def said(error: BaseException) -> str:
    """The type and the first line of an error's message, for use in another message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('.')}"


def _explanation(
    replay: PipelineReplay, columns: dict[str, list[Any]], generators: list[torch.Generator], raised: str
) -> tuple[str, str]:
    """Find the cause by running the pipeline's own call, first with its own scheduler, then with the memoryless one.

    Returns:
        `broken` and `way_out`, as `refusal` takes them.
    """
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
    """Whether the call raises an error, evaluated without gradient."""
    try:
        with torch.no_grad():
            call()
    except Exception:
        return True
    return False


def _is_the_replays(error: BaseException) -> bool:
    """Whether a file of this folder raised the error. The message cannot tell, because pipelines name themselves, too."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).parent == Path(__file__).parent
