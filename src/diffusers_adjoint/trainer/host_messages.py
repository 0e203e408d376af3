"""What diffusers says at every call of a pipeline, said once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["said_once"]


HOST = "diffusers"


class _FirstOfEachPlace(logging.Filter):
    """Lets errors pass, and of the host's other records the first of each line of code: its text may name other prompts later."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, int]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(f"{HOST}."):  # of another library that shares the handler
            return True
        place = record.pathname, record.lineno
        known = place in self._seen
        self._seen.add(place)
        return record.levelno >= logging.ERROR or not known


@contextmanager
def said_once() -> Iterator[None]:
    """Within this context each message of diffusers is shown once: a pipeline is called for every batch.

    The handlers are filtered, not the loggers: a logger passes what its children say unfiltered.
    """
    filters = [(handler, _FirstOfEachPlace()) for handler in logging.getLogger(HOST).handlers]
    for handler, first in filters:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler, first in filters:
            handler.removeFilter(first)
