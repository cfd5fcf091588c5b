"""Bytes to and from what travels."""

import math
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.codec import (
    JOB_ID,
    decode_json,
    encode_json,
    object_text,
    pack_states,
    parse_json,
    unpack_states,
)
from protocols.errors import InvalidRequest
from protocols.message import (
    CallGuide,
    Image,
    JsonGuide,
    Message,
    Reasoning,
    Text,
    Thinking,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
)
from protocols.rollout_state import (
    Logprobs,
    RolloutState,
    SampleParams,
    Status,
    TokenIds,
)

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=8).map(TokenIds)
logprobs = st.lists(st.floats(width=32), max_size=8).map(Logprobs)
texts = st.text(max_size=10)
blocks = st.one_of(
    st.builds(Text, texts),
    st.builds(Thinking, texts),
    st.builds(Image, texts),
    st.builds(ToolUse, texts, texts, texts),
    st.builds(
        ToolResult,
        texts,
        st.lists(st.builds(Text, texts) | st.builds(Image, texts), max_size=2).map(tuple),
        st.booleans(),
    ),
)
tools = st.lists(st.builds(Tool, texts, st.none() | texts, texts), max_size=2).map(tuple)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant"]),
    content=st.lists(blocks, max_size=3).map(tuple),
)
params = st.builds(
    SampleParams,
    n=st.integers(1, 128),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 2),
    stops=st.lists(texts, max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple),
    logit_bias=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.floats(-100, 100)), max_size=2).map(
        tuple
    ),
    guide=st.none() | st.builds(JsonGuide, texts) | st.builds(CallGuide, tools, st.booleans()),
    sampling_seed=st.none() | st.integers(0, 2**63 - 1),
)
states = st.builds(
    RolloutState,
    rollout_id=texts,
    group_id=st.none() | texts,
    session_id=st.none() | texts,
    index=st.integers(0, 127),
    message=st.lists(messages, max_size=3).map(tuple),
    prompt=st.none() | texts,
    tools=tools,
    tool_choice=st.builds(
        ToolChoice, st.sampled_from(["auto", "none", "required"]), st.none() | texts, st.booleans()
    ),
    reasoning=st.builds(Reasoning, st.none() | st.booleans(), st.none() | texts),
    prompt_ids=token_ids,
    sample_params=params,
    response=st.none() | texts,
    output=st.lists(blocks, max_size=2).map(tuple),
    parse_error=st.none() | texts,
    response_ids=token_ids,
    logprobs=logprobs,
    top_ids=token_ids,
    top_logprobs=logprobs,
    policy_versions=st.lists(
        st.tuples(st.integers(0, 2**40), st.integers(0, 2**31)), max_size=3
    ).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "tool_calls", "abort", "error"]),
    stop_reason=st.none() | texts | st.integers(0, 2**32 - 1),
    status=st.sampled_from(Status),
    error_msg=st.none() | texts,
)
ARRAYS = ("prompt_ids", "response_ids", "logprobs", "top_ids", "top_logprobs")


def bare(state: RolloutState) -> RolloutState:
    """Without its arrays, in which a NaN would equal nothing."""
    return msgspec.structs.replace(
        state,
        prompt_ids=TokenIds(),
        response_ids=TokenIds(),
        logprobs=Logprobs(),
        top_ids=TokenIds(),
        top_logprobs=Logprobs(),
    )


@given(state=states)
def test_a_state_comes_back_byte_for_byte(state: RolloutState) -> None:
    (back,) = unpack_states(pack_states([state]))
    assert bare(back) == bare(state)
    for name in ARRAYS:
        assert type(getattr(back, name)) is type(getattr(state, name))
        assert getattr(back, name).tobytes() == getattr(state, name).tobytes()


@given(first=states, others=st.lists(states, max_size=3))
def test_samples_of_one_prompt_share_it_on_the_wire(
    first: RolloutState, others: list[RolloutState]
) -> None:
    group = [
        first,
        *(
            msgspec.structs.replace(
                other,
                message=first.message,
                prompt=first.prompt,
                tools=first.tools,
                prompt_ids=first.prompt_ids,
            )
            for other in others
        ),
    ]
    back = unpack_states(pack_states(group))
    assert [bare(state) for state in back] == [bare(state) for state in group]
    assert all(state.prompt_ids == first.prompt_ids for state in back)


def test_a_group_carries_its_prompt_once() -> None:
    state = RolloutState(
        message=(Message("user", (Text("m" * 1000),)),),
        tools=(Tool("t" * 1000),),
        prompt_ids=TokenIds(range(1000)),
    )
    assert len(pack_states([state] * 8)) < len(pack_states([state])) + 500


def test_arrays_travel_as_little_endian_u32_and_f32() -> None:
    ids, values = [0, 1, 2**32 - 1], [-0.5, -math.inf, 0.0]
    packed = pack_states([RolloutState(response_ids=TokenIds(ids), logprobs=Logprobs(values))])
    (wire,) = msgspec.msgpack.decode(packed)
    assert wire["response_ids"] == struct.pack("<3I", *ids)
    assert wire["logprobs"] == struct.pack("<3f", *values)


def test_no_bytes_are_no_states() -> None:
    assert unpack_states(b"") == ()


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_token_ids_out_of_range_are_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        TokenIds([token_id])


@given(
    value=st.dictionaries(texts, st.none() | st.booleans() | st.integers(-(2**63), 2**63) | texts)
)
def test_json_objects_come_back(value: dict[str, object]) -> None:
    assert decode_json(encode_json(value)) == value


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    """A nested struct."""

    name: str


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    """A struct to decode into."""

    inner: list[Inner]
    n: int = 0


decoder = msgspec.json.Decoder(Outer)


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"inner":[],"n":"a"}', "`n`: Expected `int`, got `str`", "n"),
        (b'{"inner":[{"name":1}]}', "`inner[0].name`: Expected `str`, got `int`", "inner[0].name"),
        (b'{"inner":[{}]}', "`inner[0].name`: required", "inner[0].name"),
        (b"{}", "`inner`: required", "inner"),
        (b'{"inner":[],"m":1}', "`m`: unknown field", "m"),
        (b'{"inner":[{"name":"a","x":1}]}', "`inner[0].x`: unknown field", "inner[0].x"),
        (b"3", "body: Expected `object`, got `int`", None),
    ],
)
def test_misfit_names_its_field(body: bytes, message: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(decoder, body)
    assert (caught.value.message, caught.value.param) == (message, param)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "truncated"),
        (b'{"inner":[{"name":"\\ud800"}]}', "lone surrogate"),
        (b'{"inner":[{"name":"\xff"}]}', "utf-8"),
        (b'{"inner":' + b"[" * 100_000, "not valid JSON|Expected"),
    ],
)
def test_broken_json_is_told_as_such(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_json(decoder, body)
    assert "Traceback" not in caught.value.message


def test_a_long_unknown_field_is_cut() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(decoder, b'{"inner":[],"' + b"x" * 100_000 + b'":1}')
    assert len(caught.value.message) < 600
    assert len(caught.value.param or "") <= 256


@pytest.mark.parametrize("job_id", ["a", "A.b_c:d~e-9", "x" * 128])
def test_job_ids_may_be(job_id: str) -> None:
    assert JOB_ID.fullmatch(job_id)


@pytest.mark.parametrize("job_id", ["", "a b", "a/b", "é", "a\n", "{a}", "x" * 129])
def test_job_ids_may_not_be(job_id: str) -> None:
    assert not JOB_ID.fullmatch(job_id)


def test_compact_text_of_an_object_says_the_same() -> None:
    assert object_text(' { "a" : [1, 2.50] ,\n"b": "é" } ') == '{"a":[1,2.5],"b":"é"}'
    for text in ("", "[1]", "{", '{"a": NaN}', '{"a": "\ud800"}', '{"a":' * 300 + "1" + "}" * 300):
        assert object_text(text) is None
