"""Logging, set up once per process, on standard error: a line for people, or a JSON object a line for machines.

A record may carry `extra={"fields": {...}}`: values that the JSON has under their names. Its message says them too.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

from afd import env


def setup(who: str, form: str | None = None) -> None:
    """Call once at process start; `who` names the process in every line, for example 'attention 0'. `form` is text or
    json; None: as AFD_LOG_FORMAT says."""
    environment = env.read()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(who) if (form or environment.log_format) == "json" else _text(who))
    logging.basicConfig(level=environment.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _text(who: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s {who:<12} %(levelname).1s %(message)s", "%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, who, logger, message, the record's fields, what was raised."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "who": self._who,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
