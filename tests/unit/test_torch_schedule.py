"""Which samples run next: order, rows and memory."""

from collections.abc import Sized
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from protocols.rollout_state import SampleParams, TokenIds
from worker.engines.base import Call
from worker.engines.torch_engine.schedule import Request, Schedule

CONTEXT = 64


def request(prompt: int, most: int, n: int = 1) -> Request:
    call = Call(TokenIds(range(prompt)), SampleParams(n=n, max_tokens=most))
    return Request(call, CONTEXT, frozenset())


def schedule(*requests: Request, slots: int = 4, budget: int = 1000, chunk: int = 32) -> Schedule:
    made = Schedule(slots, budget, chunk, CONTEXT)
    made.waiting.extend(requests)
    return made


def nothing(_prompt_ids: Sized) -> int:
    """No prompt's beginning is known."""
    return 0


def started(made: Schedule) -> list[Request]:
    """Forward what is admitted and begin what is ready, as a step does."""
    admitted = made.admit(nothing)
    for one in admitted:
        made.ready.extend(one.samples)
    return [sample.request for sample in made.begin()]


def test_short_prompts_are_forwarded_together_and_a_long_one_alone() -> None:
    short, long, last = [request(10, 5) for _ in range(4)], request(40, 5), request(2, 5)
    made = schedule(*short, long, last, slots=8)
    assert made.admit(nothing) == short[:3]  # 4 x 10 positions would be more than a chunk
    assert made.admit(nothing) == short[3:]
    assert made.admit(nothing) == [long]
    assert made.admit(nothing) == [last]


def test_padding_counts_in_a_chunk() -> None:
    first, wide = request(2, 5), request(20, 5)
    assert schedule(first, wide).admit(nothing) == [first]


def test_only_what_is_not_known_counts_in_a_chunk_and_all_of_it_in_memory() -> None:
    first, second, third = [request(30, 5) for _ in range(3)]
    made = schedule(first, second, third)
    assert made.admit(lambda prompt_ids: len(prompt_ids) - 2) == [first, second]  # 3 x 31 positions
    assert made.admit(nothing) == [third]


def test_a_prompt_waits_while_no_row_would_be_free() -> None:
    group, next_one = request(4, 5, n=6), request(4, 5)
    made = schedule(group, next_one)
    assert started(made) == [group] * 4
    assert started(made) == []
    group.samples[0].ended = group.samples[3].ended = True
    list(made.retire(made.ended_rows()))
    assert [sample.request for sample in made.begin()] == [group] * 2
    assert made.admit(nothing) == []


def test_a_row_waits_until_all_rows_could_grow_to_their_end() -> None:
    long, short = request(10, 30), request(4, 4)
    made = schedule(long, short, budget=79)  # 2 rows x 40
    assert started(made) == [long]
    assert started(made) == []
    long.samples[0].ended = True
    list(made.retire(made.ended_rows()))
    assert started(made) == [short]


def test_the_context_bounds_what_a_sample_may_have() -> None:
    assert request(60, 100).samples[0].limit == 4
    open_end = Call(TokenIds(range(60)), SampleParams())
    assert Request(open_end, CONTEXT, frozenset()).samples[0].limit == 4


def test_samples_given_up_take_no_row_and_no_prompt_is_forwarded_for_them() -> None:
    gone, partly = request(4, 5), request(4, 5, n=3)
    gone.stream.close()
    partly.stream.stop(1)
    made = schedule(gone, partly)
    assert made.admit(nothing) == [partly]
    made.ready.extend(partly.samples)
    assert [sample.index for sample in made.begin()] == [0, 2]


def test_the_last_row_moves_into_the_hole() -> None:
    requests = [request(4 + i, 5) for i in range(4)]
    made = schedule(*requests)
    assert started(made) == requests
    requests[1].samples[0].ended = requests[3].samples[0].ended = True
    assert list(made.retire(made.ended_rows())) == [(2, 1, 6)]
    assert [row.request for row in made.rows] == [requests[0], requests[2]]


def test_a_sample_given_up_while_others_leave_keeps_its_row_for_one_more_step() -> None:
    first, second = request(4, 5), request(4, 5)
    made = schedule(first, second)
    assert started(made) == [first, second]
    first.samples[0].ended = True
    ended = made.ended_rows()
    second.stream.close()
    assert list(made.retire(ended)) == [(1, 0, 4)]
    assert [(row.request, row.ended) for row in made.rows] == [(second, True)]
    assert made.ended_rows() == [0]


def resumed(*kept: int, most: int = 20, ended: tuple[int, ...] = ()) -> Request:
    params = SampleParams(n=len(kept), max_tokens=most, stop_token_ids=(9,))
    ids = tuple(TokenIds([5] * count) for count in kept)
    return Request(
        Call(TokenIds(range(10)), params, kept=ids, ended=frozenset(ended)), CONTEXT, frozenset()
    )


def test_a_row_with_kept_tokens_is_drawn_from_once_a_token_of_its_own_came() -> None:
    fresh, one, three = resumed(0, 1, 3).samples
    assert [(len(s.token_ids), s.forwarded_tokens, s.drawn_from) for s in (fresh, one, three)] == [
        (10, 10, False),
        (11, 10, False),
        (13, 10, False),
    ]
    assert three.forward(2) == [5, 5]
    assert (three.forwarded_tokens, three.drawn_from) == (12, False)
    three.draws.tokens += 1
    assert three.drawn_from
    assert {s.reserved_tokens for s in (fresh, one, three)} == {30}


def test_a_row_is_moved_with_what_it_has_forwarded() -> None:
    gone, behind = request(4, 5), resumed(6)
    made = schedule(gone, behind)
    assert started(made) == [gone, behind]
    behind.samples[0].forward(1)
    gone.samples[0].ended = True
    assert list(made.retire(made.ended_rows())) == [(1, 0, 11)]


def test_samples_that_are_whole_wait_for_no_row() -> None:
    told_so = resumed(3, 3, ended=(0,))
    full = resumed(20, 21)
    made = schedule(told_so, full)
    assert started(made) == [told_so]
    assert [sample.index for sample in made.rows] == [1]
    assert full.ended
    assert not made.waiting


async def test_a_whole_sample_says_why_it_ends_and_the_stream_waits_for_nobody_else() -> None:
    params = SampleParams(n=3, max_tokens=20, stop_token_ids=(9,))
    kept = (TokenIds([5] * 20), TokenIds([5, 9]), TokenIds([5, 5]))
    asked = Call(TokenIds(range(10)), params, kept=kept, ended=frozenset([2]))
    segments = [segment async for segment in Request(asked, CONTEXT, frozenset()).stream]
    assert [(s.index, s.start, len(s.token_ids), s.finish_reason) for s in segments] == [
        (0, 20, 0, "length"),
        (1, 2, 0, "stop"),
    ]


@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))),
    slots=st.integers(1, 6),
    budget=st.integers(CONTEXT, 4 * CONTEXT),
    endings=st.randoms(use_true_random=False),
)
def test_every_sample_runs_once_in_order_within_rows_and_memory(
    requests: list[tuple[int, int, int]], slots: int, budget: int, endings: Random
) -> None:
    asked = [request(prompt, most, n) for prompt, most, n in requests]
    made = schedule(*asked, slots=slots, budget=budget)
    begun: list[tuple[int, int]] = []
    while made.waiting or made.ready or made.rows:
        if not made.ready:
            for one in made.admit(nothing):
                made.ready.extend(one.samples)
        begun += [(asked.index(sample.request), sample.index) for sample in made.begin()]
        assert made.rows, "nothing runs though something waits"
        assert len(made.rows) <= slots
        assert len(made.rows) * made.longest <= budget
        endings.choice(made.rows).ended = True
        for source, target, _ in made.retire(made.ended_rows()):
            assert target < source == len(made.rows)
    assert begun == [(i, sample.index) for i, one in enumerate(asked) for sample in one.samples]
