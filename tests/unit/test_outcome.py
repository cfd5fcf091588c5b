"""What becomes of an attempt: `run_job` makes one of five outcomes of it, and each is one step of the queue."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from protocols.codec import decode_json, encode_json, unpack_states
from protocols.errors import Cancelled, EngineFailed
from protocols.job import JobStatus
from protocols.queue.rows import Ending, Failure, Hold, Lease
from tests.job_body import Body, chat, claude, scripted
from worker.engines.base import Call
from worker.engines.scripted import ScriptedEngine
from worker.outcome import Completed, Ended, HandedBack, Lost, Outcome, Retried, Settler
from worker.pipeline import Attempt, Order, run_job

if TYPE_CHECKING:
    from protocols.queue.broker import Broker


def lease(body: Body | bytes | None, *, left_ms: int | None = None, **fields: str) -> Lease:
    given = {name.encode(): text.encode() for name, text in fields.items()}
    if body is not None:
        given[b"body"] = body if isinstance(body, bytes) else encode_json(body)
    return Lease(job_id="j", fence="3:n", lane="normal", left_ms=left_ms, fields=given)


async def outcome_of(
    given: Lease, *, order: Order | None = None, engine: ScriptedEngine | None = None
) -> Outcome:
    attempt = Attempt(given)
    running = asyncio.ensure_future(run_job(attempt, engine or ScriptedEngine(), "pool"))
    if order is not None:
        await asyncio.sleep(0.03)
        attempt.give(order)
    async with asyncio.timeout(10):
        return await running


SLOW = scripted("x" * 1000, ms_per_token=10)


async def test_an_answer_is_completed_with_body_and_state() -> None:
    outcome = await outcome_of(
        lease(chat("hello", n=2), group="g"), engine=ScriptedEngine(policy_version=6)
    )
    assert isinstance(outcome, Completed)
    assert (outcome.policy_version, outcome.oldest_version) == (6, 6)
    body = decode_json(outcome.body)
    assert (body["id"], body["rollout"]["attempts"]) == ("chatcmpl-j", 3)
    states = unpack_states(outcome.state)
    assert [(state.rollout_id, state.group_id) for state in states] == [("j/0", "g"), ("j/1", "g")]


async def test_an_answer_of_no_tokens_draws_none() -> None:
    body = {"max_tokens": 0, "messages": [{"role": "user", "content": "hi"}]}
    outcome = await outcome_of(lease(body, protocol="claude.messages"))
    assert isinstance(outcome, Completed)
    answer = decode_json(outcome.body)
    assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
    assert answer["usage"]["output_tokens"] == 0


@pytest.mark.parametrize(
    ("given", "code", "status"),
    [
        (lease(b"{"), "invalid_request", 400),
        (lease(None), "invalid_request", 400),
        (lease(chat("x"), timeout_ms="soon"), "invalid_request", 400),
        (lease(chat("x"), protocol="nope"), "unknown_protocol", 400),
        (lease(chat("x", model="other")), "model_not_found", 404),
        (lease(chat("x", prediction={"type": "content"})), "unsupported_option", 400),
        (
            lease({"messages": [{"role": "user", "content": "x" * 140_000}]}),
            "context_length_exceeded",
            400,
        ),
    ],
)
async def test_a_bad_job_is_ended_with_the_error_of_its_dialect(
    given: Lease, code: str, status: int
) -> None:
    outcome = await outcome_of(given)
    assert isinstance(outcome, Ended)
    assert (outcome.status, outcome.error.code, outcome.error.http_status) == (
        JobStatus.FAILED,
        code,
        status,
    )
    assert decode_json(outcome.body)["error"]["message"] == outcome.error.message


async def test_the_error_of_a_claude_job_has_the_shape_of_claude() -> None:
    outcome = await outcome_of(lease(claude("x", top_p=7), protocol="claude.messages"))
    assert isinstance(outcome, Ended)
    body = decode_json(outcome.body)
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")


async def test_a_failing_engine_is_tried_again() -> None:
    outcome = await outcome_of(lease(scripted("abc", fail="error", at_token=1)))
    assert isinstance(outcome, Retried)
    assert outcome.error.code == "engine_failed"


class BrokenEngine(ScriptedEngine):
    def generate(self, call: Call) -> Any:  # noqa: ANN401
        raise ZeroDivisionError("s3cret /path")


async def test_a_fault_of_ours_is_tried_again_and_tells_nothing_inside() -> None:
    outcome = await outcome_of(lease(chat("x")), engine=BrokenEngine())
    assert isinstance(outcome, Retried)
    assert "s3cret" not in outcome.error.message
    assert "log" in outcome.error.message


class ShortEngine(ScriptedEngine):
    def generate(self, call: Call) -> Any:  # noqa: ANN401
        class Nothing:
            def __aiter__(self) -> AsyncIterator[object]:
                return self

            async def __anext__(self) -> object:
                raise StopAsyncIteration

            def stop(self, index: int) -> None: ...

            def close(self) -> None: ...

        return Nothing()


async def test_a_sample_without_an_end_is_no_answer() -> None:
    outcome = await outcome_of(lease(chat("x")), engine=ShortEngine())
    assert isinstance(outcome, Retried)
    assert isinstance(outcome.error, EngineFailed)


@pytest.mark.parametrize(
    ("order", "status", "code"),
    [
        ("cancel", JobStatus.CANCELLED, "cancelled"),
        ("expire", JobStatus.EXPIRED, "deadline_exceeded"),
        ("stale", JobStatus.EXPIRED, "staleness_exceeded"),
    ],
)
async def test_an_order_ends_a_generation(order: Order, status: JobStatus, code: str) -> None:
    engine = ScriptedEngine()
    outcome = await outcome_of(lease(SLOW), order=order, engine=engine)
    assert isinstance(outcome, Ended)
    assert (outcome.status, outcome.error.code) == (status, code)
    assert engine.running_samples == 0


async def test_hand_back_and_lost_are_outcomes_of_their_own() -> None:
    assert isinstance(await outcome_of(lease(SLOW), order="hand back"), HandedBack)
    assert isinstance(await outcome_of(lease(SLOW), order="lost"), Lost)


async def test_an_order_before_the_generation_spends_no_token() -> None:
    engine, attempt = ScriptedEngine(), Attempt(lease(chat("x")))
    attempt.give("cancel")
    attempt.give("lost")  # the first order counts
    outcome = await run_job(attempt, engine, "pool")
    assert isinstance(outcome, Ended)
    assert isinstance(outcome.error, Cancelled)
    assert engine.generated_tokens == 0


async def test_the_deadline_is_kept_without_the_server() -> None:
    outcome = await outcome_of(lease(SLOW, left_ms=50))
    assert isinstance(outcome, Ended)
    assert outcome.status is JobStatus.EXPIRED


async def test_a_cancelled_task_stays_cancelled() -> None:
    running = asyncio.ensure_future(run_job(Attempt(lease(SLOW)), ScriptedEngine(), "pool"))
    await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


class Steps:
    """The broker's steps, noted down; `kept` is what finish and release answer."""

    def __init__(self, *, kept: bool = True) -> None:
        self.kept = kept
        self.called: list[tuple[str, object]] = []

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        self.called += [("finish", ending) for ending in endings]
        return [self.kept] * len(endings)

    async def fail(self, failures: Sequence[Failure], *, limit: int) -> list[str]:
        self.called += [(f"fail of {limit}", failure) for failure in failures]
        return ["retry" if self.kept else "lost"] * len(failures)

    async def release(self, leases: Sequence[tuple[str, str]]) -> list[bool]:
        self.called += [("release", pair) for pair in leases]
        return [self.kept] * len(leases)


async def settled(outcome: Outcome, *, kept: bool = True, backoff_s: float = 1.0) -> Steps:
    steps = Steps(kept=kept)
    settler = Settler(cast("Broker", steps), fail_limit=4, backoff_s=backoff_s, lease_s=15)
    await settler.settle(lease(None), outcome)
    await settler.close()
    return steps


async def test_a_completed_outcome_is_a_finish() -> None:
    steps = await settled(Completed(b"B", b"S", policy_version=2, oldest_version=1))
    assert steps.called == [
        ("finish", Ending("j", "3:n", JobStatus.COMPLETED, 200, b"B", b"S", "", 2, 1))
    ]


async def test_an_ended_outcome_is_a_finish_with_its_error() -> None:
    steps = await settled(Ended(JobStatus.CANCELLED, Cancelled("c"), b"E"))
    assert steps.called == [
        ("finish", Ending("j", "3:n", JobStatus.CANCELLED, 499, b"E", error="cancelled"))
    ]


async def test_a_retried_outcome_fails_with_a_delay_below_its_bound() -> None:
    delays: list[int] = []
    for _ in range(50):
        ((step, failure),) = (await settled(Retried(EngineFailed("broke")))).called
        assert step == "fail of 4"
        assert isinstance(failure, Failure)
        assert failure.message == "broke"
        delays.append(failure.delay_ms)
    assert 0 <= min(delays) < max(delays) <= 4000  # 1 s, doubled twice: it is the third attempt


async def test_a_job_handed_back_often_is_not_delayed_for_ever() -> None:
    steps = Steps(kept=True)
    settler = Settler(cast("Broker", steps), fail_limit=4, backoff_s=1, lease_s=15)
    often = msgspec.structs.replace(lease(None), fence="500:n")
    for _ in range(50):
        await settler.settle(often, Retried(EngineFailed("broke")))
    await settler.close()
    failures = [failure for _, failure in steps.called if isinstance(failure, Failure)]
    assert len(failures) == 50
    assert max(failure.delay_ms for failure in failures) <= 60_000


async def test_a_hand_back_is_a_release_and_lost_is_nothing() -> None:
    assert (await settled(HandedBack())).called == [("release", Hold("j", "3:n"))]
    assert (await settled(Lost())).called == []


@pytest.mark.parametrize(
    "outcome",
    [
        Completed(b"", b"", 0, 0),
        Ended(JobStatus.FAILED, Cancelled("x"), b""),
        Retried(EngineFailed("x")),
        HandedBack(),
        Lost(),
    ],
    ids=lambda outcome: type(outcome).__name__,
)
async def test_a_lost_lease_is_logged(outcome: Outcome, caplog: pytest.LogCaptureFixture) -> None:
    await settled(outcome, kept=False)
    assert "job j: the lease of attempt 3:n was lost" in caplog.text


async def test_outcomes_of_many_jobs_travel_together() -> None:
    calls: list[int] = []

    class Counting(Steps):
        async def finish(self, endings: Sequence[Ending]) -> list[bool]:
            calls.append(len(endings))
            return await super().finish(endings)

    settler = Settler(cast("Broker", Counting()), fail_limit=4, backoff_s=0, lease_s=15)
    done = Completed(b"", b"", 0, 0)
    await asyncio.gather(*(settler.settle(lease(None), done) for _ in range(50)))
    assert calls == [50]
