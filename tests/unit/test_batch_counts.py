"""What a batch counts and shows."""

import statistics

from producer_sdk.batch.answer import Seen, seen_in, seen_in_reply, written
from producer_sdk.batch.rollout import rollout_lines
from producer_sdk.batch.runner import Look
from producer_sdk.batch.tally import Lengths, Tally
from producer_sdk.cli.batch_screen import told
from protocols import codec
from protocols.errors import StalenessExceeded
from protocols.job import JobStatus, Reply
from protocols.rollout_state import RolloutState, Status


def test_lengths_are_percentiles_of_the_rows_with_an_answer() -> None:
    tally = Tally()
    lengths = [number * number for number in range(1, 101)]
    for length in reversed(lengths):
        tally.add(Seen(None, 3, length, ("stop",)))
    tally.add(Seen("engine_failed"))
    assert tally.lengths() == Lengths(lengths[49], lengths[94], lengths[99])
    assert lengths[49] <= statistics.median(lengths) <= lengths[50]
    assert (tally.done, tally.failed, tally.prompt_tokens) == (100, 1, 300)


def test_several_samples_count_with_their_mean_and_each_reason() -> None:
    tally = Tally()
    tally.add(Seen(None, 3, 30, ("stop", "length", "stop")))
    assert tally.lengths() == Lengths(10, 10, 10)
    assert tally.reasons == {"stop": 2, "length": 1}


def test_a_failed_row_whose_samples_were_complete_is_read_back_as_failed() -> None:
    packed = codec.pack_states([RolloutState(status=Status.COMPLETED)])
    reply = Reply("b-1", JobStatus.EXPIRED, 410, b"{}", packed, StalenessExceeded.code)
    lines = rollout_lines("b-1", "a", reply)
    assert seen_in(written(lines)).fault == seen_in_reply(reply).fault == reply.error


def test_a_batch_without_answers_has_no_lengths() -> None:
    assert Tally().lengths() == Lengths(0, 0, 0)


def test_a_look_in_words_names_what_failed_and_how_long_it_takes() -> None:
    look = Look(
        rows=10,
        done=4,
        failed=2,
        invalid=1,
        faults={"engine_failed": 2},
        in_flight=3,
        most_in_flight=16,
        oldest_s=7.2,
        workers=2,
        response_tokens=400,
        tokens_per_s=1234.5,
        rows_per_s=3.0,
        eta_s=3 * 3600 + 120,
        wish="run",
    )
    assert told(look) == (
        "1,234 tokens/s, ETA 3 h 02 min, 3/16 in flight, oldest 7 s, 2 workers, failed: 2 engine_failed"
    )
