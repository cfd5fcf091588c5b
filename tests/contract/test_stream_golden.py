"""Streams of every dialect: of each golden case one file in tests/golden/streams, compared byte by byte.

The samples come three tokens a segment, by turns; their pieces are those of the golden blocks. ROLLOUTQ_GOLDEN=write
writes the files anew.
"""

import json
import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import msgspec
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from protocols.codec import encode_json
from protocols.dialects import DIALECTS, dialect_of
from protocols.dialects.base import Normal, Piece, Streamed
from protocols.job import Segment
from protocols.message import Text, Thinking, ToolUse
from protocols.rollout_state import Logprobs, RolloutState, TokenIds
from tests.contract.test_dialect_golden import (
    CASES,
    Case,
    answer_to,
    blocks_of,
    load,
    named,
    respond,
    said_by_claude,
    said_by_openai,
)
from tests.sse import TEXT_OF, choices, events, generate_text, objects

GOLDEN = Path(__file__).parents[1] / "golden" / "streams"
SEGMENT_TOKENS = 3
SSE = {"content-type": "text/event-stream"}
STREAMED = [path for path in CASES if load(path).protocol != "claude.count_tokens"]
each_case = pytest.mark.parametrize("path", STREAMED, ids=named)


def segments_of(state: RolloutState) -> list[Segment]:
    wide = state.sample_params.top_logprobs
    version = state.policy_versions[0][0] if state.policy_versions else 0
    return [
        Segment(
            state.index,
            at,
            TokenIds(state.response_ids[at : at + SEGMENT_TOKENS]),
            Logprobs(state.logprobs[at : at + SEGMENT_TOKENS]),
            TokenIds(state.top_ids[at * wide : (at + SEGMENT_TOKENS) * wide]),
            Logprobs(state.top_logprobs[at * wide : (at + SEGMENT_TOKENS) * wide]),
            version,
        )
        for at in range(0, len(state.response_ids), SEGMENT_TOKENS)
    ]


def pieces_of(state: RolloutState, *, plain: bool) -> list[Piece]:
    """Text and thinking in parts of four characters, calls whole."""
    blocks = () if plain else state.output
    pieces: list[Piece] = []
    for block in blocks or (Text(state.text),):
        match block:
            case Text(text) | Thinking(text):
                kind = "text" if isinstance(block, Text) else "thinking"
                parts = fours(text)
                pieces += [Piece(kind, part, opens=i == 0) for i, part in enumerate(parts)]
            case ToolUse(id, name, arguments):
                pieces.append(Piece("tool_use", arguments, True, id, name))
            case _:
                raise AssertionError(block)
    return pieces


def fours(text: str) -> list[str]:
    return [text[at : at + 4] for at in range(0, len(text), 4)]


def frames_of(case: Case) -> bytes:
    """Segments of all samples by turns, a piece with each; what is left over is held back until the end."""
    dialect = dialect_of(case.protocol)
    normal = dialect.normalize(encode_json(case.body))
    answer = answer_to(case, normal)
    stream = dialect.stream(streamed(case, normal, answer.states))
    pieces = [pieces_of(state, plain=stream.plain) for state in answer.states]
    frames = [stream.begin()]
    for turn in zip_longest(*map(segments_of, answer.states)):
        for segment in filter(None, turn):
            shown = pieces[segment.index][:1]
            del pieces[segment.index][:1]
            frames.append(stream.add(segment, shown))
    return b"".join([*frames, stream.end(dialect.respond(answer), pieces)])


def streamed(case: Case, normal: Normal, states: Sequence[RolloutState]) -> Streamed:
    begun = {"response": None, "output": (), "response_ids": TokenIds(), "logprobs": Logprobs()}
    return Streamed(
        job_id=case.answer.job_id,
        model=case.answer.model,
        created_s=case.answer.created_s,
        states=tuple(msgspec.structs.replace(state, **begun) for state in states),
        usage=normal.stream_usage,
        ignored=normal.ignored,
        token_bytes=lambda token_id: bytes([token_id]),
        asked=normal.asked,
    )


def read(case: Case, frames: bytes) -> list[dict[str, object]]:
    """What the official client makes of the frames, one a sample."""
    answering = httpx2.MockTransport(lambda _: httpx2.Response(200, content=frames, headers=SSE))
    match case.protocol:
        case "openai.chat":
            with openai_client(answering) as client:
                state = ChatCompletionStreamState()
                for chunk in client.chat.completions.create(model="m", messages=[], stream=True):
                    state.handle_chunk(chunk)
                whole = state.current_completion_snapshot
                return [said_by_openai(choice.message) for choice in whole.choices]
        case "openai.completions":
            with openai_client(answering) as client:
                texts: dict[int, str] = {}
                for chunk in client.completions.create(model="m", prompt="p", stream=True):
                    for choice in chunk.choices:
                        texts[choice.index] = texts.get(choice.index, "") + choice.text
                return [{"text": texts[index]} for index in sorted(texts)]
        case "claude.messages":
            with (
                anthropic.Anthropic(
                    api_key="-",
                    base_url="http://rollout",
                    max_retries=0,
                    http_client=httpx2.Client(transport=answering),
                ) as client,
                client.messages.stream(model="m", max_tokens=9, messages=[]) as stream,
            ):
                return [said_by_claude(stream.get_final_message())]
        case _:
            return [{"text": generate_text(frames)}]


def openai_client(transport: httpx2.MockTransport) -> openai.OpenAI:
    return openai.OpenAI(
        api_key="-",
        base_url="http://rollout/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
    )


def test_every_dialect_that_streams_has_golden_streams() -> None:
    assert {load(path).protocol for path in STREAMED} == {*DIALECTS} - {"claude.count_tokens"}


@each_case
def test_frames_are_the_golden_ones(path: Path) -> None:
    golden, frames = GOLDEN / f"{path.stem}.sse", frames_of(load(path))
    if os.environ.get("ROLLOUTQ_GOLDEN") == "write":
        golden.write_bytes(frames)
    assert frames == golden.read_bytes()


@each_case
def test_the_official_client_reads_the_same_from_stream_replay_and_response(path: Path) -> None:
    case = load(path)
    replayed = dialect_of(case.protocol).replay(respond(case))
    said = [blocks_of(state) for state in case.samples]
    if case.protocol == "generate":
        said = [{"text": case.samples[0].text}]
    assert read(case, frames_of(case)) == said
    assert read(case, replayed) == said


@each_case
def test_the_last_event_with_a_sample_has_our_own_results(path: Path) -> None:
    case = load(path)
    for frames in (frames_of(case), dialect_of(case.protocol).replay(respond(case))):
        results = [told["rollout"] for told in objects(frames) if "rollout" in told]
        assert results == [case.response["rollout"]]
        whole: Any = case.response.get("choices", ())
        shown = [choice["rollout"] for choice in choices(frames) if "rollout" in choice]
        assert shown == [choice["rollout"] for choice in whole if "rollout" in choice]


@each_case
def test_events_are_in_the_order_of_the_protocol(path: Path) -> None:
    case = load(path)
    text_of = TEXT_OF[case.protocol]
    replayed = dialect_of(case.protocol).replay(respond(case))
    assert text_of(frames_of(case)) == text_of(replayed)


def test_usage_comes_last_where_it_was_asked_for() -> None:
    case = load(next(path for path in STREAMED if path.stem == "openai_chat_minimal"))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    frames = frames_of(msgspec.structs.replace(case, body={**case.body, **options}))
    *chunks, usage, done = events(frames)
    assert done.data == "[DONE]"
    assert (usage.data["choices"], usage.data["usage"]) == ([], case.response["usage"])
    assert all(chunk.data["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("protocol", sorted(DIALECTS))
def test_an_error_frame_raises_in_the_official_client(protocol: str) -> None:
    body = b'{"type":"error","error":{"type":"api_error","message":"it broke"},"request_id":"r"}'
    frame = dialect_of(protocol).error_frame(body)
    (only,) = events(frame)
    assert only.data == json.loads(body)
    if protocol in ("openai.chat", "claude.messages"):
        case = next(case for path in STREAMED if (case := load(path)).protocol == protocol)
        with pytest.raises((openai.APIError, anthropic.APIStatusError), match="it broke"):
            read(case, frame)
