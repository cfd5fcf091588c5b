"""The list of models: what the pool's live workers serve, in OpenAI's shape or Anthropic's."""

from typing import Any

from producer_sdk.exchange.request import Request
from producer_sdk.exchange.response import Response, of_json
from producer_sdk.exchange.route import MODELS
from producer_sdk.fleet import Fleet
from protocols.errors import ModelNotFound

OWNER = "rolloutq"
UNKNOWN_DAY = "1970-01-01T00:00:00Z"
"""A worker does not say when its model was made."""


def models_of(fleet: Fleet, request: Request, request_id: str) -> Response:
    """The list, or the one model that the path names; raises ModelNotFound."""
    names = sorted({worker["model"] for worker in fleet.workers.values() if worker.get("model")})
    entry = _claude_entry if request.speaks_claude else _openai_entry
    wanted = request.path.removeprefix(MODELS).removeprefix("/")
    if wanted and wanted not in names:
        raise ModelNotFound(
            f"no live worker of pool {fleet.pool} serves {wanted[:80]!r}; "
            f"served now: {', '.join(names) or 'none'}",
            param="model",
        )
    if wanted:
        return of_json(entry(wanted), request_id)
    entries = [entry(name) for name in names]
    return of_json(
        _claude_list(entries) if request.speaks_claude else _openai_list(entries), request_id
    )


def _openai_entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": OWNER}


def _openai_list(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": entries}


def _claude_entry(name: str) -> dict[str, Any]:
    return {"id": name, "type": "model", "display_name": name, "created_at": UNKNOWN_DAY}


def _claude_list(entries: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = (entries[0]["id"], entries[-1]["id"]) if entries else (None, None)
    return {"data": entries, "has_more": False, "first_id": first, "last_id": last}
