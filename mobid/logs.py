# SPDX-License-Identifier: Apache-2.0
"""The peer's own log, `mobid.log`: one JSON object a line, rotated, and never a secret in it."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog

LIMIT = 4 << 20
KEPT = 2

_SECRET = frozenset({"secret", "token", "key", "keys", "private_key", "password"})


def configure(path: Path) -> None:
    """Send all log lines of this process to `path`."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LIMIT, backupCount=KEPT, delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    # A line that cannot be written, as on a full disk, is lost; the program it speaks of goes on.
    logging.raiseExceptions = False
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _without_secrets,
            structlog.processors.JSONRenderer(default=str),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _without_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in _SECRET & event.keys():
        event[name] = "***"
    return event
