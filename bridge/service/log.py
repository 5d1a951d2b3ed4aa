"""Logging: one event a line on stderr, logfmt or JSON, at a level that can be changed while the process runs."""

from __future__ import annotations

import logging
import sys
from typing import Final, get_args

import structlog

from bridge.config import LogLevel

LEVELS: Final[tuple[LogLevel, ...]] = get_args(LogLevel)
_NUMBERS = {level: logging.getLevelNamesMapping()[level.upper()] for level in LEVELS} | {"critical": logging.CRITICAL}
_threshold: LogLevel = "info"


class LevelError(ValueError):
    """Not a level; the text names those there are."""


def configure(level: LogLevel = "info", form: str = "logfmt") -> None:
    """Set up structlog for this process; `form` is logfmt or json."""
    set_level(level)
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
    structlog.configure(
        processors=[
            _drop_below,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        # every level gets as far as _drop_below: what is filtered by the loggers' class stays so for ever
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def level() -> LogLevel:
    """The lowest level that is written now."""
    return _threshold


def writes(name: LogLevel) -> bool:
    """Whether events of this level are written now."""
    return _NUMBERS[name] >= _NUMBERS[_threshold]


def set_level(name: str) -> None:
    """From now on write events of level `name` and above. Raises LevelError."""
    global _threshold
    chosen = next((known for known in LEVELS if known == name), None)
    if chosen is None:
        raise LevelError(f"{name!r} is not a level; there are {', '.join(LEVELS)}")
    _threshold = chosen


def _drop_below(_: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if _NUMBERS["error" if method == "exception" else method] < _NUMBERS[_threshold]:
        raise structlog.DropEvent
    return event
