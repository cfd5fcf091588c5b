"""Whatever the official clients' request types allow is understood or refused in the dialect's own shape."""

import json
from typing import Any, get_args

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from anthropic.types.shared import ErrorResponse, ErrorType
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as plain_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.shared import ErrorObject

from protocols.codec import decode_json
from protocols.dialects import dialect_of
from protocols.dialects.base import Dialect, Normal
from protocols.errors import RequestError
from tests.property.typed_body import strategy_of

REQUESTS: list[tuple[str, object]] = [
    ("openai.chat", chat_params.CompletionCreateParamsNonStreaming),
    ("openai.chat", chat_params.CompletionCreateParamsStreaming),
    ("openai.completions", plain_params.CompletionCreateParamsNonStreaming),
    ("claude.messages", message_create_params.MessageCreateParamsNonStreaming),
    ("claude.messages", message_create_params.MessageCreateParamsStreaming),
    ("claude.messages", beta_create_params.MessageCreateParamsNonStreaming),
    ("claude.count_tokens", message_count_tokens_params.MessageCountTokensParams),
]
policies: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [{}, *({"rollout": {"unsupported": policy}} for policy in ("ignore", "warn", "error"))]
)


def outcome(dialect: Dialect, body: dict[str, Any]) -> Normal | RequestError:
    try:
        return dialect.normalize(json.dumps(body).encode())
    except RequestError as refusal:
        return refusal


def check_refusal(dialect: Dialect, refusal: RequestError) -> None:
    body = decode_json(dialect.error(refusal, "job-1"))
    assert refusal.http_status == 400
    if dialect.name.startswith("claude."):
        assert ErrorResponse.construct(None, **body).error.type in get_args(ErrorType)
        assert (body["type"], body["request_id"]) == ("error", "job-1")
    else:
        assert ErrorObject.model_validate(body["error"], strict=True).message == refusal.message


def check_understood(found: Normal) -> None:
    state = found.state
    given_prompts = (state.message, state.prompt, state.prompt_ids)
    assert sum(map(bool, given_prompts)) == 1
    assert all(message.content for message in state.message)
    for tool in state.tools:
        assert isinstance(json.loads(tool.parameters), dict)
    if state.tool_choice.mode == "required":
        assert state.sample_params.guide is not None


@pytest.mark.parametrize(
    ("protocol", "request_type"),
    [pytest.param(*row, id=f"{row[0]}-{n}") for n, row in enumerate(REQUESTS)],
)
@given(data=st.data())
def test_request_of_an_official_client_is_understood_or_refused(
    protocol: str, request_type: object, data: st.DataObject
) -> None:
    dialect = dialect_of(protocol)
    body = data.draw(strategy_of(request_type)) | data.draw(policies) | {"model": "m"}
    if "max_tokens" in body:
        body["max_tokens"] = data.draw(st.sampled_from([8, 8, 8, 0, -1, 2**40, None]))
    found = outcome(dialect, body)
    if isinstance(found, Normal):
        check_understood(found)
    else:
        check_refusal(dialect, found)
