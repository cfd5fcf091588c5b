"""What a checkpoint carries out, and when."""

import threading
from collections.abc import Sequence

import pytest

from protocols.job import Segment
from protocols.rollout_state import FinishReason, Logprobs, SampleParams, TokenIds
from worker.checkpoint import UNIT_TOKENS, Checkpoint, StreamedCheckpoint
from worker.engines.scripted import ByteTokenizer
from worker.framer import Framer
from worker.parse import Sample

FAR_TOKENS, FAR_S = 10**9, 1e9
LIMIT_S = 30


class Clock:
    """The time that a checkpoint sees."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("worker.checkpoint.time", made)
    return made


def sample(wide: int = 0) -> Sample:
    return Sample(SampleParams(top_logprobs=wide), ByteTokenizer())


def grow(
    one: Sample,
    tokens: int,
    *,
    version: int = 0,
    finish_reason: FinishReason | None = None,
) -> None:
    """Add a segment in which every number tells its position."""
    start = len(one.ids)
    positions = range(start, start + tokens)
    alternatives = [position * 10 + k for position in positions for k in range(one.wide)]
    one.add(
        Segment(
            index=0,
            start=start,
            token_ids=TokenIds(position % 256 for position in positions),
            logprobs=Logprobs(-position for position in positions),
            top_ids=TokenIds(alternatives),
            top_logprobs=Logprobs(-one for one in alternatives),
            policy_version=version,
            finish_reason=finish_reason,
        )
    )


def spans(segments: Sequence[Segment]) -> list[tuple[int, int, int, int]]:
    """(index, start, tokens, version) of each."""
    return [(s.index, s.start, len(s.token_ids), s.policy_version) for s in segments]


def test_so_many_new_tokens_of_all_samples_together_make_it_due() -> None:
    both = [sample(), sample()]
    checkpoint = Checkpoint(both)
    grow(both[0], 40)
    grow(both[1], 23)
    assert not checkpoint.due(64, FAR_S)
    grow(both[1], 1)
    assert checkpoint.due(64, FAR_S)
    checkpoint.written(checkpoint.segments())
    assert not checkpoint.due(64, FAR_S)


def test_one_new_token_makes_it_due_after_a_while(clock: Clock) -> None:
    one = sample()
    checkpoint = Checkpoint([one])
    clock.now_s += 100
    assert not checkpoint.due(FAR_TOKENS, 2.0)  # nothing is new
    grow(one, 1)
    assert checkpoint.due(FAR_TOKENS, 2.0)
    checkpoint.written(checkpoint.segments())
    grow(one, 1)
    clock.now_s += 1.9
    assert not checkpoint.due(FAR_TOKENS, 2.0)
    clock.now_s += 0.1
    assert checkpoint.due(FAR_TOKENS, 2.0)


def test_what_earlier_attempts_kept_is_not_new() -> None:
    resumed = sample()
    grow(resumed, 70)
    checkpoint = Checkpoint([resumed])
    assert (checkpoint.new_tokens, checkpoint.segments(), checkpoint.grown) == (0, [], False)
    grow(resumed, 5)
    assert spans(checkpoint.segments()) == [(0, 70, 5, 0)]
    assert not checkpoint.grown
    checkpoint.written(checkpoint.segments())
    assert checkpoint.grown


def test_a_segment_holds_what_belongs_to_its_tokens() -> None:
    one = sample(wide=2)
    checkpoint = Checkpoint([one])
    grow(one, 3)
    checkpoint.written(checkpoint.segments())
    grow(one, 2)
    (segment,) = checkpoint.segments()
    assert list(segment.token_ids) == [3, 4]
    assert list(segment.logprobs) == [-3, -4]
    assert list(segment.top_ids) == [30, 31, 40, 41]
    assert list(segment.top_logprobs) == [-30, -31, -40, -41]


def test_segments_are_cut_where_the_policy_version_changes() -> None:
    one, other = sample(), sample()
    checkpoint = Checkpoint([one, other])
    grow(one, 4, version=1)
    checkpoint.written(checkpoint.segments())
    grow(one, 2, version=1)
    grow(one, 3, version=2)
    grow(other, 1, version=2)
    grow(one, 1, version=5, finish_reason="length")
    segments = checkpoint.segments()
    assert spans(segments) == [(0, 4, 2, 1), (0, 6, 3, 2), (0, 9, 1, 5), (1, 0, 1, 2)]
    assert [segment.finish_reason for segment in segments] == [None, None, "length", None]


def test_a_version_that_changed_at_the_border_needs_no_cut() -> None:
    one = sample()
    grow(one, 4, version=1)
    checkpoint = Checkpoint([one])
    grow(one, 4, version=2)
    assert spans(checkpoint.segments()) == [(0, 4, 4, 2)]


def test_only_what_was_written_is_left_out_of_the_next() -> None:
    one = sample()
    checkpoint = Checkpoint([one])
    grow(one, 10)
    on_its_way = checkpoint.segments()
    grow(one, 7)
    checkpoint.written(on_its_way)
    assert spans(checkpoint.segments()) == [(0, 10, 7, 0)]
    assert checkpoint.new_tokens == 7


def test_after_a_rewind_the_next_is_whole() -> None:
    one, other = sample(), sample()
    grow(one, 10, version=3)
    checkpoint = Checkpoint([one, other])
    grow(one, 2, version=4)
    grow(other, 1, version=4)
    checkpoint.written(checkpoint.segments())
    checkpoint.rewind()
    assert checkpoint.new_tokens == 13
    assert spans(checkpoint.segments()) == [(0, 0, 10, 3), (0, 10, 2, 4), (1, 0, 1, 4)]


def test_checkpoints_read_while_a_sample_grows_join_to_what_it_became() -> None:
    one = sample(wide=1)
    checkpoint = Checkpoint([one])
    read: list[Segment] = []

    def keep() -> None:
        while not read or read[-1].finish_reason is None:
            segments = checkpoint.segments()
            checkpoint.written(segments)
            read.extend(segments)

    keeper = threading.Thread(target=keep)
    keeper.start()
    for turn in range(3000):
        grow(one, 1 + turn % 5, version=turn // 100)
    grow(one, 1, version=30, finish_reason="stop")
    keeper.join(LIMIT_S)
    assert not keeper.is_alive()

    again = sample(wide=1)
    for segment in read:
        assert segment.start == len(again.ids)
        assert len(segment.logprobs) == len(segment.top_ids) == len(segment.token_ids)
        again.add(segment)
    for field in ("ids", "logprobs", "top_ids", "top_logprobs", "versions", "finish_reason"):
        assert getattr(again, field) == getattr(one, field), field


class Frames(Framer):
    """Notes for how many tokens frames were made."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def add(self, segment: Segment) -> Segment:
        self.tokens.append(len(segment.token_ids))
        return segment


def test_frames_are_made_of_few_tokens_at_a_time() -> None:
    """Else a long answer that comes at once would hold the lease keeper's loop."""
    one, frames = sample(), Frames()
    checkpoint = StreamedCheckpoint([one], frames, ())
    grow(one, 2 * UNIT_TOKENS + 1, finish_reason="length")
    sent: list[Segment] = []
    while checkpoint.due(1, 0):
        new = checkpoint.segments()
        assert sum(frames.tokens) - sum(len(part.token_ids) for part in sent) <= UNIT_TOKENS
        checkpoint.written(new)
        sent += new
    assert frames.tokens == [UNIT_TOKENS, UNIT_TOKENS, 1]
    assert [part.start for part in sent] == [0, UNIT_TOKENS, 2 * UNIT_TOKENS]
    assert [part.finish_reason for part in sent] == [None, None, "length"]
