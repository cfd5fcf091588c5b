"""What every dialect does alike."""

import msgspec
import pytest

from protocols.dialects import DIALECTS, dialect_of, error_body, http_status
from protocols.dialects.base import Answer, Dialect
from protocols.errors import InvalidRequest, RolloutError, UnknownProtocol
from protocols.message import Message, Text
from protocols.rollout_state import RolloutState, Status
from tests.dialect_bodies import BLOCKS, PLAIN, dotted, normalize, put

each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
drawing = pytest.mark.parametrize(
    "dialect", [dialect for dialect in DIALECTS.values() if dialect.name != "claude.count_tokens"]
)
with_messages = pytest.mark.parametrize("protocol", BLOCKS)


def test_dialects_are_found_by_their_names() -> None:
    names = "openai.chat openai.completions claude.messages claude.count_tokens generate"
    assert list(DIALECTS) == names.split()
    assert all(dialect_of(name).name == name for name in DIALECTS)


def test_unknown_protocol_is_refused_with_the_names() -> None:
    with pytest.raises(UnknownProtocol, match=", ".join(DIALECTS)) as caught:
        dialect_of("openai.chit" * 50)
    assert caught.value.param == "protocol"
    assert len(caught.value.message) < 200


def test_unknown_protocol_gets_an_error_body_in_openais_shape() -> None:
    error = UnknownProtocol("no such protocol", param="protocol")
    body = error_body("soap", error, "job-1")
    assert body == dialect_of("openai.chat").error(error, "job-1")
    assert error_body("claude.messages", error, "job-1") != body


@pytest.mark.parametrize(
    ("protocol", "status", "told"),
    [
        ("claude.messages", 503, 529),
        ("claude.count_tokens", 503, 529),
        ("claude.messages", 504, 504),
        ("openai.chat", 503, 503),
        ("generate", 503, 503),
        ("soap", 503, 503),
    ],
)
def test_overload_has_the_status_that_the_client_knows(
    protocol: str, status: int, told: int
) -> None:
    assert http_status(protocol, status) == told


@with_messages
def test_unknown_field_is_refused_by_name(protocol: str) -> None:
    for at in [("temprature",), ("messages", 0, "rôle"), ("messages", 0, "content", 0, "txt")]:
        with pytest.raises(InvalidRequest) as caught:
            normalize(protocol, put(BLOCKS[protocol], at, 1))
        assert caught.value.param == dotted(at)
        assert caught.value.message == f"`{dotted(at)}`: unknown field"


def test_claude_has_no_n() -> None:
    with pytest.raises(InvalidRequest, match="`n`: unknown field"):
        normalize("claude.messages", PLAIN["claude.messages"] | {"n": 2})


@each_dialect
def test_model_is_optional_and_reported(dialect: Dialect) -> None:
    assert normalize(dialect.name, PLAIN[dialect.name]).model is None
    assert normalize(dialect.name, PLAIN[dialect.name] | {"model": "m"}).model == "m"


@drawing
def test_stream_is_asked_for_by_the_body(dialect: Dialect) -> None:
    assert not normalize(dialect.name, PLAIN[dialect.name]).stream
    asked = normalize(dialect.name, PLAIN[dialect.name] | {"stream": True})
    assert (asked.stream, asked.stream_usage, asked.ignored) == (True, False, ())


@pytest.mark.parametrize("protocol", ["openai.chat", "openai.completions"])
def test_usage_of_a_stream_is_asked_for_by_the_body(protocol: str) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    assert normalize(protocol, PLAIN[protocol] | options).stream_usage


def test_count_says_that_nothing_is_to_be_drawn() -> None:
    assert normalize("claude.count_tokens", PLAIN["claude.count_tokens"]).counts
    others = [name for name in DIALECTS if name != "claude.count_tokens"]
    assert not any(normalize(name, PLAIN[name]).counts for name in others)


@each_dialect
def test_rollout_options_are_the_same_everywhere(dialect: Dialect) -> None:
    options = {"group": "g", "session": "s", "script": {"text": "no", "fail": "crash"}}
    found = normalize(dialect.name, PLAIN[dialect.name] | {"rollout": options}).options
    assert (found.group, found.session) == ("g", "s")
    assert found.script is not None
    assert (found.script.text, found.script.fail) == ("no", "crash")
    with pytest.raises(InvalidRequest, match=r"`rollout\.deadline`: unknown field"):
        normalize(dialect.name, PLAIN[dialect.name] | {"rollout": {"deadline": 3}})


@with_messages
def test_empty_text_is_allowed(protocol: str) -> None:
    body = put(PLAIN[protocol], ("messages", 0, "content"), "")
    assert normalize(protocol, body).state.message == (Message("user", (Text(""),)),)


@with_messages
def test_any_unicode_text_is_kept(protocol: str) -> None:
    text = "\x00 é 漢 \U0001f600 \u2028 \ufffd"
    body = put(PLAIN[protocol], ("messages", 0, "content"), text)
    assert normalize(protocol, body).state.message == (Message("user", (Text(text),)),)


@drawing
@pytest.mark.parametrize("reason", [None, "abort", "error"])
def test_broken_sample_is_never_shown_as_an_answer(dialect: Dialect, reason: str | None) -> None:
    state = RolloutState(response="half", status=Status.COMPLETED)
    state = msgspec.structs.replace(state, finish_reason=reason)
    answer = Answer("job-1", "m", 0, (state,), (), 1, 10, lambda _: b"")
    with pytest.raises(RolloutError, match=f"it ended as {reason}"):
        dialect.respond(answer)
