"""However tokens are cut into segments, whoever goes on with them: a stream says the same."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from protocols.codec import encode_json
from protocols.dialects import dialect_of
from protocols.dialects.base import Answer, Streamed
from protocols.job import Segment
from protocols.rollout_state import Logprobs, RolloutState, TokenIds
from tests.job_body import Body
from tests.sse import TEXT_OF, choices, events, objects
from worker.checkpoint import UNIT_TOKENS, StreamedCheckpoint
from worker.engines.base import Markup
from worker.engines.scripted import END, ByteTokenizer
from worker.framer import Framer
from worker.parse import Sample
from worker.regions import Reading

MARKUP = Markup(("<think>", "</think>"), ("<tool_call>", "</tool_call>"))
CALL = '<tool_call>{"name": "f", "arguments": {"x": "<tool_call> é"}}</tool_call>'
PARTS = ("<think>", "</think>", CALL, CALL[:30], "Grüße 世界", "</tool_call>", "\n", "STO", "P")
texts = (
    st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=4)), max_size=8)
    .map("".join)
    .filter(lambda text: len(text.encode()) < UNIT_TOKENS)  # a longer segment is cut again
)


def body_of(protocol: str) -> Body:
    """With log-probabilities where they are shown token by token."""
    if protocol == "openai.completions":
        return {"prompt": "p", "logprobs": 0, "stop": "STOP"}
    messages: Body = {"messages": [{"role": "user", "content": "p"}]}
    if protocol == "claude.messages":
        return {**messages, "max_tokens": 99, "stop_sequences": ["STOP"]}
    if protocol == "generate":
        return {**messages, "sample_params": {"stops": ["STOP"]}}
    return {**messages, "logprobs": True, "stop": "STOP"}


class Job:
    """One job of a dialect whose answer is known."""

    def __init__(self, protocol: str, text: str) -> None:
        self.dialect = dialect_of(protocol)
        normal = self.dialect.normalize(encode_json(body_of(protocol)))
        self.prompt = replace(normal.state, prompt_ids=TokenIds([1]))
        whole = self.sample()
        ids = TokenIds([*text.encode(), END])
        whole.add(self.segment(ids, 0, len(ids)))
        self.ids, self.state = whole.ids, whole.state(self.prompt, "job", 0)

    def sample(self) -> Sample:
        return Sample(self.prompt.sample_params, ByteTokenizer(), Reading(MARKUP))

    def segment(self, ids: TokenIds, start: int, end: int) -> Segment:
        count = end - start
        part, logprobs = ids[start:end], Logprobs([-0.5] * count)
        reason = "stop" if end == len(ids) else None
        return Segment(0, start, TokenIds(part), logprobs, TokenIds(), Logprobs(), 0, reason)

    def framer(self, sample: Sample) -> Framer:
        streamed = Streamed("job", "m", 7, (self.prompt,), False, (), ByteTokenizer().token_bytes)
        return Framer(lambda: self.dialect.stream(streamed), [sample], "job")

    def body(self) -> bytes:
        states: tuple[RolloutState, ...] = (self.state,)
        spelled = ByteTokenizer().token_bytes
        return self.dialect.respond(Answer("job", "m", 7, states, (), 1, 10**6, spelled))

    def frames(self, cuts: Sequence[int]) -> list[bytes]:
        """Of the segments between these positions, and of the end."""
        framer = self.framer(self.sample())
        segments = [framer.add(self.segment(self.ids, a, b)) for a, b in pairwise(cuts) if a < b]
        return [*(segment.frames for segment in segments), framer.end(self.body())]


def cut(job: Job, data: st.DataObject) -> list[int]:
    inner = data.draw(st.sets(st.integers(0, len(job.ids)), max_size=9))
    return sorted({0, *inner, len(job.ids)})


def content(protocol: str, frames: Sequence[bytes]) -> object:
    """All that was said, joined: text, thinking, calls, Claude's blocks, log-probabilities."""
    blocks: dict[int, list[object]] = {}
    for event in events(frames):
        if event.name == "content_block_start":
            blocks[event.data["index"]] = [event.data["content_block"], ""]
        elif event.name == "content_block_delta":
            (text,) = [v for k, v in event.data["delta"].items() if k != "type"]
            block = blocks[event.data["index"]]
            block[1] = f"{block[1]}{text}"
    deltas = [choice.get("delta", {}) for choice in choices(frames)]
    calls: list[object] = [call for delta in deltas for call in delta.get("tool_calls", ())]
    thinking = "".join([delta.get("reasoning_content", "") for delta in deltas])
    shown: list[dict[str, Any]] = [choice.get("logprobs") or {} for choice in choices(frames)]
    tokens: list[object] = [token for one in shown for token in one.get("content", ())]
    offsets: list[object] = [at for one in shown for at in one.get("text_offset", ())]
    last = objects(frames)[-1]
    return TEXT_OF[protocol](frames), blocks, calls, thinking, tokens, offsets, last


@pytest.mark.parametrize("protocol", TEXT_OF)
@given(text=texts, data=st.data())
def test_any_cut_says_the_same_in_legal_order(
    protocol: str, text: str, data: st.DataObject
) -> None:
    job = Job(protocol, text)
    assert content(protocol, job.frames(cut(job, data))) == content(
        protocol, job.frames(range(len(job.ids) + 1))
    )


@pytest.mark.parametrize("protocol", TEXT_OF)
@given(text=texts, data=st.data())
def test_another_attempt_goes_on_with_the_very_next_byte(
    protocol: str, text: str, data: st.DataObject
) -> None:
    job = Job(protocol, text)
    cuts = cut(job, data)
    whole, kept = job.frames(cuts), data.draw(st.integers(0, len(cuts) - 1))
    sample = job.sample()
    segments = [job.segment(job.ids, a, b) for a, b in pairwise(cuts) if a < b]
    for segment in segments[:kept]:
        sample.add(segment)
    checkpoint = StreamedCheckpoint([sample], job.framer(sample), segments[:kept])
    resumed: list[Segment] = []
    for segment in segments[kept:]:
        sample.add(segment)
        new = checkpoint.segments()
        checkpoint.written(new)
        resumed += new
    rest, last = checkpoint.rest(job.body())
    assert [*(one.frames for one in (*resumed, *rest)), last] == whole[len(segments[:kept]) :]


@given(text=texts, data=st.data())
def test_a_checkpoint_that_is_rewound_sends_the_same_segments_again(
    text: str, data: st.DataObject
) -> None:
    job = Job("openai.chat", text)
    sample = job.sample()
    checkpoint = StreamedCheckpoint([sample], job.framer(sample), ())
    sent: list[Segment] = []
    for a, b in pairwise(cut(job, data)):
        sample.add(job.segment(job.ids, a, b))
        new = checkpoint.segments()
        checkpoint.written(new)
        sent += new
    checkpoint.rewind()
    again = checkpoint.segments()
    assert [(one.start, one.token_ids, one.frames) for one in again] == [
        (one.start, one.token_ids, one.frames) for one in sent
    ]
