"""Bad input gets one clear error, which names the field and the limit; the worker goes on."""

import secrets
from collections.abc import Callable
from typing import Any

import pytest

from producer_sdk import (
    BodyTooLarge,
    Client,
    InvalidRequest,
    JobConflict,
    JobStatus,
    Reply,
    RolloutError,
)
from protocols.codec import decode_json, encode_json
from protocols.job import MAX_BODY_BYTES
from tests.job_body import Body, chat, claude
from tests.pool_look import Look, wait_until
from tests.servers import both_servers

pytestmark = both_servers

LIMIT_S = 60
CONTEXT = 131_072
USER = {"role": "user", "content": "x"}


@pytest.fixture
def pool(standing: str) -> str:
    return standing


@pytest.fixture(autouse=True)
def the_worker_goes_on(client: Client, nothing_left: Callable[[], None]) -> Any:  # noqa: ANN401
    """After every bad job a good one is answered, and nothing of the bad one is left."""
    yield
    assert client.submit(chat("good")).result(LIMIT_S).states[0].text == "good"
    nothing_left()


def told(reply: Reply | dict[str, str]) -> dict[str, Any]:
    """The one error object of a failed reply."""
    if isinstance(reply, Reply):
        assert reply.status is JobStatus.FAILED
        assert not reply.states
        body = reply.response
    else:
        assert reply["status"] == "failed"
        body = decode_json(reply["body"].encode())
    error = body["error"]
    assert len(error["message"]) < 600
    assert "Traceback" not in error["message"]
    return error


def raw(look: Look, **fields: str | bytes) -> str:
    """XADD as a user would; the id of the entry."""
    words = [word for pair in fields.items() for word in pair]
    return look("XADD", look.keys.jobs("normal"), "*", *words).decode()


def raw_reply(look: Look, job_id: str) -> dict[str, str]:
    wait_until(
        lambda: look.reply(job_id).get("status") not in (None, "queued", "running"),
        f"{job_id} has a reply",
    )
    return look.reply(job_id)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": [}',
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"text"',
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
    ids=["empty", "cut", "broken", "binary", "null", "list", "string", "deep", "surrogate"],
)
@pytest.mark.parametrize("protocol", ["openai.chat", "claude.messages", "generate"])
def test_what_is_no_json_object_is_400(look: Look, protocol: str, body: bytes) -> None:
    reply = raw_reply(look, raw(look, body=body, protocol=protocol))
    assert (reply["code"], reply["error"]) == ("400", "invalid_request")
    error = told(reply)
    assert "body" in error["message"]
    assert error["type"] == "invalid_request_error"


WRONG_FIELDS: list[tuple[str, Body, str, str]] = [
    ("openai.chat", {"messages": "x"}, "messages", "array"),
    ("openai.chat", {"messages": []}, "messages", "1"),
    ("openai.chat", {"messages": [{}]}, "messages[0].role", "required"),
    ("openai.chat", {"messages": [{"role": "user"}]}, "messages[0].content", "string"),
    (
        "openai.chat",
        {"messages": [{"role": "boss", "content": "x"}]},
        "messages[0].role",
        "user",
    ),
    ("openai.chat", chat("x", n=0), "n", "1"),
    ("openai.chat", chat("x", n=129), "n", "128"),
    ("openai.chat", chat("x", n="2"), "n", "int"),
    ("openai.chat", chat("x", max_tokens=0), "max_tokens", "1"),
    ("openai.chat", chat("x", max_tokens=CONTEXT + 1), "max_tokens", str(CONTEXT)),
    ("openai.chat", chat("x", max_tokens=2**40), "max_tokens", "2147483647"),
    ("openai.chat", chat("x", temperature=3), "temperature", "2"),
    ("openai.chat", chat("x", top_p=0), "top_p", "0"),
    ("openai.chat", chat("x", top_logprobs=3), "top_logprobs", "logprobs"),
    ("openai.chat", chat("x", stop=["a"] * 17), "stop", "16"),
    ("openai.chat", chat("x", min_tokens=9, max_tokens=4), "min_tokens", "4"),
    ("openai.chat", chat("x", stop_token_ids=[262]), "stop_token_ids", "261"),
    ("openai.chat", chat("x", temprature=1), "temprature", "unknown"),
    ("openai.chat", chat("x", functions=[{"name": "f"}]), "functions", "not supported"),
    ("openai.chat", chat("x", tool_choice="required"), "tool_choice", "no tool"),
    ("openai.completions", {"prompt": ["a", "b"]}, "prompt", "a job has one"),
    ("openai.completions", {"prompt": "a", "echo": True}, "echo", "not supported"),
    ("claude.count_tokens", {"messages": []}, "messages", "1"),
    ("claude.messages", {"messages": [USER]}, "max_tokens", "required"),
    ("claude.messages", claude("x", max_tokens=CONTEXT + 1), "max_tokens", str(CONTEXT)),
    ("claude.messages", {"messages": [], "max_tokens": 5}, "messages", "1"),
    ("generate", {}, "input_ids", "exactly one"),
    ("generate", {"prompt": ""}, "prompt", "1"),
    ("generate", {"input_ids": []}, "input_ids", "1"),
    ("generate", {"input_ids": [262]}, "input_ids", "261"),
    ("generate", {"input_ids": [-1]}, "input_ids[0]", "0"),
    ("generate", {"prompt": "x", "messages": [USER]}, "input_ids", "2 were given"),
    ("generate", {"prompt": "x", "sample_params": {"n": 200}}, "sample_params.n", "128"),
]


@pytest.mark.parametrize(("protocol", "body", "field", "limit"), WRONG_FIELDS)
def test_a_wrong_field_is_named_with_its_limit(
    client: Client, protocol: str, body: dict[str, Any], field: str, limit: str
) -> None:
    reply = client.submit(body, protocol=protocol).result(LIMIT_S)
    assert reply.code == 400
    error = told(reply)
    assert field in error["message"]
    assert limit in error["message"]
    if not protocol.startswith("claude."):
        assert error["param"] == field
    with pytest.raises(RolloutError):
        reply.raise_for_status()


@pytest.mark.parametrize("protocol", ["openai.chat", "claude.messages", "generate"])
def test_a_model_that_is_not_there_is_404(client: Client, pool: str, protocol: str) -> None:
    body = claude("x", model="gpt-9") if protocol == "claude.messages" else chat("x", model="gpt-9")
    reply = client.submit(body, protocol=protocol).result(LIMIT_S)
    assert (reply.code, reply.error) == (404, "model_not_found")
    message = told(reply)["message"]
    assert "'gpt-9' is not served here" in message
    assert "'scripted'" in message


@pytest.mark.parametrize("model", ["scripted", None])
def test_the_served_model_the_pool_or_no_model_are_served(
    client: Client, pool: str, model: str | None
) -> None:
    body = chat("x", model=model or pool)
    assert client.submit(body).result(LIMIT_S).status is JobStatus.COMPLETED


def test_an_unknown_protocol_is_400_and_lists_the_known(client: Client) -> None:
    reply = client.submit(chat("x"), protocol="openai.chatt").result(LIMIT_S)
    assert (reply.code, reply.error) == (400, "unknown_protocol")
    error = told(reply)
    assert error["param"] == "protocol"
    assert (
        "'openai.chatt' is unknown; known are openai.chat, openai.completions" in error["message"]
    )


@pytest.mark.parametrize("tokens", [CONTEXT, CONTEXT + 1, 3 * CONTEXT])
@pytest.mark.parametrize("by", ["input_ids", "prompt", "messages"])
def test_a_prompt_that_leaves_no_room_is_400(client: Client, by: str, tokens: int) -> None:
    given: Any = {
        "input_ids": [65] * tokens,
        "prompt": "x" * tokens,
        "messages": [{"role": "user", "content": "x" * tokens}],
    }[by]
    reply = client.submit({by: given}, protocol="generate").result(LIMIT_S)
    assert (reply.code, reply.error) == (400, "context_length_exceeded")
    error = told(reply)
    assert str(CONTEXT) in error["message"]
    assert error["param"] == by


def test_a_prompt_that_just_fits_is_answered(client: Client) -> None:
    body = {"input_ids": [65] * (CONTEXT - 1), "sample_params": {"max_tokens": 5}}
    (state,) = client.submit(body, protocol="generate").result(LIMIT_S).states
    assert (len(state.response_ids), state.finish_reason) == (1, "length")


@pytest.mark.parametrize("job_id", ["a b", "a/b", "ä", "x" * 129, "a\n"])
def test_an_odd_job_id_is_refused_by_the_client(client: Client, job_id: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 128 of"):
        client.submit(chat("x"), job_id=job_id)


@pytest.mark.parametrize("job_id", ["a b", '"quoted"', "x" * 129, ""])
def test_an_odd_job_id_of_a_raw_entry_is_answered_under_the_id_of_the_entry(
    look: Look, job_id: str
) -> None:
    reply = raw_reply(look, raw(look, id=job_id, body=encode_json(chat("x"))))
    assert reply["code"] == "400"
    assert "`id`: 1 to 128 of" in told(reply)["message"]


def test_a_body_over_the_limit_is_refused_by_the_client(client: Client) -> None:
    with pytest.raises(BodyTooLarge) as refused:
        client.submit(chat("x" * MAX_BODY_BYTES))
    assert str(MAX_BODY_BYTES) in refused.value.message
    assert (refused.value.http_status, refused.value.param) == (413, "body")


def test_a_raw_body_over_the_limit_is_413(look: Look) -> None:
    reply = raw_reply(look, raw(look, body=encode_json(chat("x" * MAX_BODY_BYTES))))
    assert (reply["code"], reply["error"]) == ("413", "body_too_large")
    assert str(MAX_BODY_BYTES) in told(reply)["message"]


def test_a_raw_entry_without_a_body_is_400(look: Look) -> None:
    reply = raw_reply(look, raw(look, run="r"))
    assert reply["code"] == "400"
    assert "`body`: missing" in told(reply)["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout_ms", "soon"),
        ("timeout_ms", "-5"),
        ("timeout_ms", "1.5"),
        ("min_version", "new"),
        ("max_staleness", "-1"),
        ("reply_ttl_ms", "0"),
        ("reply_ttl_ms", "1e300"),
    ],
)
def test_a_wrong_number_in_a_raw_entry_is_400(look: Look, field: str, value: str) -> None:
    reply = raw_reply(look, raw(look, body=encode_json(chat("x")), **{field: value}))
    assert reply["code"] == "400"
    error = told(reply)
    assert (error["param"], f"`{field}`: a whole number" in error["message"]) == (field, True)


def test_another_body_under_an_id_is_409(client: Client, look: Look) -> None:
    job_id = f"id-{secrets.token_hex(6)}"
    first = client.submit(chat("x"), job_id=job_id)
    with pytest.raises(JobConflict) as refused:
        client.submit(chat("y"), job_id=job_id).result(LIMIT_S)
    assert (refused.value.http_status, refused.value.param) == (409, "id")
    entry = raw(look, id=job_id, body=encode_json(chat("z")))
    reply = raw_reply(look, entry)
    assert (reply["code"], reply["error"]) == ("409", "job_conflict")
    assert job_id in told(reply)["message"]
    assert first.result(LIMIT_S).states[0].text == "x"


def test_a_script_with_a_wrong_field_is_400(client: Client) -> None:
    body = chat("x", rollout={"script": {"text": "y", "fail": "melt"}})
    error = told(client.submit(body).result(LIMIT_S))
    assert error["param"] == "rollout.script.fail"
    assert "melt" in error["message"]


def test_an_error_shows_no_more_of_a_body_than_it_must(client: Client) -> None:
    error = told(client.submit(chat("x", **{"k" * 5000: 1})).result(LIMIT_S))
    assert "unknown field" in error["message"]
