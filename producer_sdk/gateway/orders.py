"""Commands to the workers over HTTP: the words of docs/control.md, as a JSON object."""

from typing import Any

import msgspec
from starlette.requests import Request as Incoming
from starlette.responses import Response

from producer_sdk.client import Client
from producer_sdk.control import WAIT_S
from producer_sdk.gateway.intake import Intake
from protocols.codec import encode_json, parse_json
from protocols.errors import InvalidRequest
from protocols.queue.control import Answers

VERBS = ("pause", "continue", "offload", "onload", "update_weights", "shutdown")
LONGEST_S = 3600.0
_decoder = msgspec.json.Decoder(dict[str, str | int | float | bool | None])


class Orders:
    """The endpoint of these verbs."""

    def __init__(self, client: Client, intake: Intake) -> None:
        """`client`: with the rights of an operator."""
        self._client, self._intake = client, intake

    async def __call__(self, incoming: Incoming) -> Response:
        """Every worker's answer, once all have obeyed; raises ControlError where one did not, or may not yet."""
        body = await self._intake.read(incoming)
        options = parse_json(_decoder, body) if body.strip() else {}
        wait_s = options.pop("wait_s", WAIT_S)
        if isinstance(wait_s, str | bool | None) or not 0 < wait_s <= LONGEST_S:
            raise InvalidRequest(f"`wait_s`: seconds, at most {LONGEST_S:g}", param="wait_s")
        verb = incoming.scope["path"].removeprefix("/")
        answers = await self._client.control(verb, wait_s=float(wait_s), **_words(options))
        return Response(encode_json(_facts(answers)), media_type="application/json")


def _words(options: dict[str, Any]) -> dict[str, str | int | bool | None]:
    whole = {name: f"{value:g}" for name, value in options.items() if isinstance(value, float)}
    return {**options, **whole}


def _facts(answers: Answers) -> dict[str, Any]:
    command: dict[str, Any] = msgspec.to_builtins(answers.command)
    return command | {"workers": msgspec.to_builtins(answers.acks)}
