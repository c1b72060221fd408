"""The log as lines of text or of JSON, one for each request, without prompts, pixels or tokens."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

FIELDS = "nuwa"  # of a record: what it says by name, for programs


def configure(style: str, level: int = logging.INFO) -> None:
    """Sends the log of this package to stderr. style: "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("nuwa")
    log.handlers, log.propagate = [handler], False
    log.setLevel(level)


def fields(**values: Any) -> dict[str, Any]:
    """For `extra` of a logging call."""
    return {FIELDS: values}


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339), level, message, what `fields` said, and an error."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)
