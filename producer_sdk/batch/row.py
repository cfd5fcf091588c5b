"""A line of the input as a job: OpenAI's and Claude's batch lines, and bare requests.

| line | protocol | body |
|---|---|---|
| `{"custom_id", "method": "POST", "url", "body"}` | that of the URL | `body` |
| `{"custom_id", "params"}` | `claude.messages` | `params` |
| `{"messages", …}`, `{"prompt", …}` | `openai.chat`, `openai.completions` | the line |
| `{"input_ids", …}`, or anything with `sample_params` | `generate` | the line |
| `[1, 2, 3]` | `generate` | `{"input_ids": the line}` |

A bare request may carry a `custom_id`; without one it is `line-<number>`.
"""

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, Raw, UnsetType

from producer_sdk.exchange.route import protocol_of
from protocols import codec
from protocols.dialects import dialect_of
from protocols.errors import BodyTooLarge, InvalidRequest
from protocols.job import MAX_BODY_BYTES

MAX_ID_CHARS = 512


class Row(msgspec.Struct, frozen=True, gc=False):
    """What one line asks for."""

    custom_id: str
    protocol: str
    body: bytes


class _Line(msgspec.Struct, frozen=True, gc=False):
    custom_id: str | UnsetType = UNSET
    method: str | UnsetType = UNSET
    url: str | UnsetType = UNSET
    body: Raw | UnsetType = UNSET
    params: Raw | UnsetType = UNSET
    input_ids: Raw | UnsetType = UNSET
    sample_params: Raw | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET


_line = msgspec.json.Decoder(_Line)
_object = msgspec.json.Decoder(dict[str, Raw])


class Rows:
    """Reads lines as the command says."""

    def __init__(
        self, *, protocol: str | None = None, params: Mapping[str, object] | None = None
    ) -> None:
        """`protocol`: that of bare requests. `params`: set in every body, whatever it says itself.

        Raises UnknownProtocol.
        """
        self._protocol = None if protocol is None else dialect_of(protocol).name
        self._params = {
            name: Raw(codec.encode_json(value)) for name, value in (params or {}).items()
        }

    def row(self, line: bytes, number: int) -> Row:
        """The job of a line; raises RolloutError where it is none. The body is not looked into."""
        line = line.strip()
        if line[:1] == b"[":
            return self._made(f"line-{number}", "generate", b'{"input_ids":%b}' % line)
        told = codec.parse_json(_line, line)
        custom_id = f"line-{number}" if told.custom_id is UNSET else told.custom_id
        if not 0 < len(custom_id) <= MAX_ID_CHARS:
            raise InvalidRequest(f"`custom_id`: 1 to {MAX_ID_CHARS} characters", param="custom_id")
        if told.body is not UNSET:
            if told.url is UNSET:
                raise InvalidRequest("`url`: required beside `body`", param="url")
            method = "POST" if told.method is UNSET else told.method
            return self._made(custom_id, protocol_of(method, told.url), bytes(told.body))
        if told.params is not UNSET:
            return self._made(custom_id, "claude.messages", bytes(told.params))
        body = line if told.custom_id is UNSET else _without_id(line)
        return self._made(custom_id, self._protocol or _guess(told), body)

    def checked(self, line: bytes, number: int) -> Row:
        """The job of a line whose body its dialect takes; raises RolloutError, which names what is wrong."""
        row = self.row(line, number)
        if len(row.body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"a body has at most {MAX_BODY_BYTES} bytes", param="body")
        dialect_of(row.protocol).normalize(row.body)
        return row

    def _made(self, custom_id: str, protocol: str, body: bytes) -> Row:
        if self._params:
            fields = codec.parse_json(_object, body)
            if protocol == "generate":
                inner = codec.parse_json(_object, bytes(fields.get("sample_params", b"{}")))
                fields["sample_params"] = Raw(codec.encode_json(inner | self._params))
            else:
                fields |= self._params
            body = codec.encode_json(fields)
        return Row(custom_id, protocol, body)


def _guess(told: _Line) -> str:
    if told.input_ids is not UNSET or told.sample_params is not UNSET:
        return "generate"
    if told.messages is not UNSET:
        return "openai.chat"
    if told.prompt is not UNSET:
        return "openai.completions"
    raise InvalidRequest(
        "no request: a line has `body` with `url`, or `params`, or `messages`, `prompt` or `input_ids`"
    )


def _without_id(line: bytes) -> bytes:
    fields = codec.parse_json(_object, line)
    del fields["custom_id"]
    return codec.encode_json(fields)
