"""What the demo asks, and when it says that all is well."""

import pytest

from producer_sdk.cli.demo import Fault, check
from producer_sdk.cli.demo_jobs import TOKENS, bodies
from producer_sdk.cli.demo_report import verdict
from protocols import codec
from protocols.dialects import DIALECTS
from protocols.errors import RolloutError
from protocols.job import JobStatus, Reply

FAULT = Fault("anna", frozenset({"a"}))


def reply(
    job_id: str, worker: str, attempts: int, status: JobStatus = JobStatus.COMPLETED
) -> Reply:
    return Reply(job_id, status, 200, b"{}", worker=worker, attempts=attempts)


GOOD = [reply("a", "bert", 2), reply("b", "bert", 1)]


@pytest.mark.parametrize(("protocol", "body"), [row[1:] for row in bodies()])
def test_every_prompt_of_the_demo_is_taken_whole(protocol: str, body: dict[str, object]) -> None:
    normal = DIALECTS[protocol].normalize(codec.encode_json(body))
    assert normal.ignored == ()
    assert normal.state.sample_params.max_tokens == TOKENS


def test_demo_speaks_every_dialect() -> None:
    assert {protocol for _, protocol, _ in bodies()} == set(DIALECTS)


def test_answered_fault_passes() -> None:
    check(GOOD, FAULT)


@pytest.mark.parametrize(
    ("replies", "fault", "named"),
    [
        ([*GOOD, reply("c", "bert", 1, JobStatus.FAILED)], FAULT, "job c failed"),
        ([reply("a", "anna", 1), GOOD[1]], FAULT, "job a"),
        ([reply("a", "bert", 1), GOOD[1]], FAULT, "job a"),
        ([GOOD[0], reply("b", "bert", 2)], FAULT, "job b"),
        ([GOOD[1]], Fault("anna", frozenset()), "held nothing"),
    ],
)
def test_demo_fails_unless_the_fault_happened_and_all_was_answered(
    replies: list[Reply], fault: Fault, named: str
) -> None:
    with pytest.raises(RolloutError, match=named):
        check(replies, fault)


def test_verdict_counts_and_names_who_answered_again() -> None:
    told = verdict(GOOD, "anna", {"a"}, 3.21)
    assert told == (
        "2 of 2 jobs answered, 1 were on the killed worker anna and were generated again by bert, 3.2 s"
    )
