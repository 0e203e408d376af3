"""Show each log message of diffusers once, instead of once for every call of a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["said_once"]


HOST = "diffusers"


class _FirstOfEachPlace(logging.Filter):
    """Pass errors, and the first other record from each line of code of diffusers; by line, as texts may differ in the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, int]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(f"{HOST}."):  # another library that shares the handler
            return True
        place = record.pathname, record.lineno
        known = place in self._seen
        self._seen.add(place)
        return record.levelno >= logging.ERROR or not known


@contextmanager
def said_once() -> Iterator[None]:
    """Within this context each message of diffusers is shown once.

    The filter is on the handlers: a filter on a logger does not apply to records of its child loggers.
    """
    filters = [(handler, _FirstOfEachPlace()) for handler in logging.getLogger(HOST).handlers]
    for handler, first in filters:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler, first in filters:
            handler.removeFilter(first)
