"""What the server says on stderr: a line per request and per fault, for people or as JSON. Never a message's text."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from dapji.server.record import Record

Style = Literal["text", "json"]
_requests = logging.getLogger("dapji.requests")


def configure(style: Style) -> None:
    """For the process."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if style == "json" else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    _requests.setLevel(logging.INFO)
    # What it says of requests stands in our lines; of its own it has nothing that an operator needs.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)


def tell(record: Record) -> None:
    """A request that has ended."""
    tokens = f" {record.prompt} ({record.cached} cached) + {record.generated} tokens" if record.model else ""
    first = "" if record.first_token is None else f", first after {record.first_token:.2f} s"
    _requests.info(
        "%s %s %d%s%s%s, %.2f s%s",
        record.method,
        record.route,
        record.status,
        f" {record.key}" if record.key else "",
        f" {record.model}" if record.model else "",
        tokens,
        record.seconds,
        first,
        extra={"request": record},
    )


class Json(logging.Formatter):
    """One object a line (https://jsonlines.org)."""

    def format(self, line: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(line.created, UTC).isoformat(timespec="milliseconds"),
            "level": line.levelname.lower(),
        }
        record = getattr(line, "request", None)
        if isinstance(record, Record):
            told |= {
                "key": record.key or None,
                "method": record.method,
                "route": record.route,
                "model": record.model,
                "status": record.status,
                "prompt_tokens": record.prompt,
                "cached_tokens": record.cached,
                "generated_tokens": record.generated,
                "first_token_seconds": None if record.first_token is None else round(record.first_token, 4),
                "seconds": round(record.seconds, 4),
            }
        else:
            told["message"] = line.getMessage()
            if line.exc_info:
                told["exception"] = self.formatException(line.exc_info)
        return msgspec.json.encode(told).decode()
