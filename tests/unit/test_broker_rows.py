"""Rows of the server as typed values: leases, jobs, replies, refusals."""

import hashlib

import pytest
from redis.exceptions import NoPermissionError, ResponseError

from protocols.errors import BodyTooLarge, InvalidRequest, ServerUnavailable
from protocols.job import DEFAULT_REPLY_TTL_MS, MAX_BODY_BYTES, Job, JobStatus, Reply
from protocols.queue.refusals import refusal
from protocols.queue.rows import Lease, body_hash, check_job, job_of, protocol_of


def lease(**fields: bytes) -> Lease:
    return Lease("j", "2:n", "normal", None, {name.encode(): v for name, v in fields.items()})


def test_a_bare_body_is_a_job_with_defaults() -> None:
    assert job_of(lease(body=b"{}")) == Job(id="j", body=b"{}")
    assert job_of(lease(body=b"{}")).reply_ttl_ms == DEFAULT_REPLY_TTL_MS
    assert lease().attempt == 2


def test_the_fields_of_an_entry_are_those_of_the_job() -> None:
    job = job_of(
        lease(
            body=b"{}",
            protocol=b"generate",
            group=b"g",
            session="s\u00e4".encode(),
            timeout_ms=b"5000",
            min_version=b"0",
            max_staleness=b"3",
            reply_ttl_ms=b"60000",
        )
    )
    assert (job.protocol, job.group, job.session) == ("generate", "g", "sä")
    assert (job.timeout_ms, job.min_version, job.max_staleness) == (5000, 0, 3)
    assert job.reply_ttl_ms == 60_000


def test_a_protocol_that_is_no_text_is_still_answered() -> None:
    assert protocol_of(lease(protocol=b"\xff")) == "\ufffd"
    assert protocol_of(lease()) == "openai.chat"


@pytest.mark.parametrize("name", ["timeout_ms", "min_version", "max_staleness", "reply_ttl_ms"])
@pytest.mark.parametrize(
    "value", [b"", b"x", b"-1", b"1.5", b"1e3", b"9" * 14, b"\xff", "٣".encode()]
)
def test_a_number_that_is_none_is_refused_by_name(name: str, value: bytes) -> None:
    with pytest.raises(InvalidRequest, match=f"`{name}`: a whole number") as refused:
        job_of(lease(body=b"{}", **{name: value}))
    assert refused.value.param == name


@pytest.mark.parametrize("name", ["timeout_ms", "reply_ttl_ms"])
def test_a_time_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="from 1 to"):
        job_of(lease(body=b"{}", **{name: b"0"}))


def test_a_missing_body_is_refused_and_shown_how() -> None:
    with pytest.raises(InvalidRequest, match="XADD") as refused:
        job_of(lease(bodi=b"{}"))
    assert refused.value.param == "body"


def test_a_body_may_have_as_many_bytes_as_the_limit() -> None:
    check_job(Job(id="j", body=b" " * MAX_BODY_BYTES))
    with pytest.raises(BodyTooLarge, match=str(MAX_BODY_BYTES)) as refused:
        check_job(Job(id="j", body=b" " * (MAX_BODY_BYTES + 1)))
    assert refused.value.http_status == 413


def test_a_hash_tells_protocol_and_bytes_apart() -> None:
    hashes = {
        body_hash("openai.chat", b"{}"),
        body_hash("generate", b"{}"),
        body_hash("openai.chat", b"{ }"),
    }
    assert len(hashes) == 3
    expected = hashlib.sha1(b"openai.chat\0{}").hexdigest()
    assert body_hash("openai.chat", b"{}") == expected


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NoPermissionError("this user has no permissions"), "denies this user"),
        (ResponseError("OOM command not allowed"), "out of memory"),
        (ResponseError("WRONGTYPE Operation"), "refuses: WRONGTYPE"),
    ],
)
def test_a_refusal_is_told_with_the_address(error: ResponseError, told: str) -> None:
    made = refusal(error, "host:6379")
    assert isinstance(made, ServerUnavailable)
    assert made.message.startswith("Redis at host:6379")
    assert told in made.message


def test_a_terminal_status_is_one_of_five() -> None:
    terminal = {status for status in JobStatus if status.terminal}
    assert terminal == set(JobStatus) - {JobStatus.QUEUED, JobStatus.RUNNING}
    assert len(terminal) == 5


def test_a_reply_without_a_told_message_still_raises_one() -> None:
    reply = Reply(job_id="j", status=JobStatus.FAILED, code=500, body=b"{}", error="worker_lost")
    assert "job j ended failed" in str(reply.exception())
    assert reply.exception().code == "worker_lost"
