"""What the demo asks, and when it says that all is well."""

import pytest

from producer_sdk.cli.demo import Fault, check
from producer_sdk.cli.demo_jobs import STORY, STORY_TOKENS, TOKENS, bodies
from producer_sdk.cli.demo_report import continued, verdict
from protocols import codec
from protocols.dialects import DIALECTS
from protocols.errors import RolloutError
from protocols.job import JobStatus, Reply

FAULT = Fault("anna", frozenset({STORY}), 96)


def reply(
    job_id: str, worker: str, attempts: int, status: JobStatus = JobStatus.COMPLETED
) -> Reply:
    return Reply(job_id, status, 200, b"{}", worker=worker, attempts=attempts)


GOOD = [reply(STORY, "bert", 2), reply("b", "bert", 1)]


@pytest.mark.parametrize(("job_id", "protocol", "body"), bodies())
def test_every_prompt_of_the_demo_is_taken_whole(
    job_id: str, protocol: str, body: dict[str, object]
) -> None:
    normal = DIALECTS[protocol].normalize(codec.encode_json(body))
    assert normal.ignored == ()
    assert normal.state.sample_params.max_tokens == (STORY_TOKENS if job_id == STORY else TOKENS)


def test_demo_speaks_every_dialect_that_draws_tokens() -> None:
    assert {protocol for _, protocol, _ in bodies()} == set(DIALECTS) - {"claude.count_tokens"}


def test_answered_fault_passes() -> None:
    check(GOOD, FAULT)


@pytest.mark.parametrize(
    ("replies", "fault", "named"),
    [
        ([*GOOD, reply("c", "bert", 1, JobStatus.FAILED)], FAULT, "job c failed"),
        ([reply(STORY, "anna", 1), GOOD[1]], FAULT, "job story"),
        ([reply(STORY, "bert", 1), GOOD[1]], FAULT, "job story"),
        ([GOOD[0], reply("b", "bert", 2)], FAULT, "job b"),
        ([GOOD[1]], Fault("anna", frozenset(), 96), "held no checkpoint"),
        (GOOD, Fault("anna", frozenset({STORY}), 0), "held no checkpoint"),
    ],
)
def test_demo_fails_unless_the_fault_happened_and_all_was_answered(
    replies: list[Reply], fault: Fault, named: str
) -> None:
    with pytest.raises(RolloutError, match=named):
        check(replies, fault)


def test_verdict_counts_and_names_who_answered_again() -> None:
    told = verdict(GOOD, "anna", {STORY}, 3.21)
    assert told == (
        "2 of 2 jobs answered, 1 were on the killed worker anna and were continued by bert, 3.2 s"
    )


def test_continued_names_the_token_after_those_that_were_kept() -> None:
    assert continued(GOOD, STORY, 96) == "story: continued by bert from token 97 of 0"
