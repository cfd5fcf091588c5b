"""The command line without a server: usage, exit codes, and what is printed of a reply."""

import math
from pathlib import Path

import pytest

from producer_sdk.cli import FAILED, GOOD, UNREACHABLE, USAGE, exit_code, run
from producer_sdk.cli.answer import failure, fields, mean_logprob, texts
from producer_sdk.cli.request import asking, read_body
from protocols import codec
from protocols.dialects import DIALECTS
from protocols.errors import (
    ConfigError,
    ControlBusy,
    ControlRefused,
    DeadlineExceeded,
    InvalidCommand,
    InvalidRequest,
    JobConflict,
    JobNotFound,
    NoLiveWorker,
    PoolNotPrepared,
    ResultTimeout,
    RolloutError,
    ServerUnavailable,
)
from protocols.job import JobStatus, Reply
from protocols.message import Text
from protocols.rollout_state import Logprobs, RolloutState, TokenIds

Captured = pytest.CaptureFixture[str]


def reply_of(*states: RolloutState, **more: object) -> Reply:
    given = {"status": JobStatus.COMPLETED, "code": 200, "body": b"{}", **more}
    return Reply(job_id="j", packed_state=codec.pack_states(states) if states else b"", **given)  # pyright: ignore[reportArgumentType]


def sample(index: int, text: str, *logprobs: float) -> RolloutState:
    ids = TokenIds(range(len(logprobs)))
    return RolloutState(index=index, response=text, response_ids=ids, logprobs=Logprobs(logprobs))


def refused_reply() -> Reply:
    body = b'{"error":{"message":"`n`: at most 128"}}'
    return reply_of(status=JobStatus.FAILED, code=400, body=body, error="invalid_request")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServerUnavailable, UNREACHABLE),
        (PoolNotPrepared, UNREACHABLE),
        (NoLiveWorker, UNREACHABLE),
        (ConfigError, USAGE),
        (InvalidRequest, USAGE),
        (JobConflict, USAGE),
        (InvalidCommand, USAGE),
        (ControlRefused, FAILED),
        (ControlBusy, FAILED),
        (JobNotFound, FAILED),
        (DeadlineExceeded, FAILED),
        (ResultTimeout, FAILED),
        (RolloutError, FAILED),
    ],
)
def test_every_error_has_its_exit_code(error: type[RolloutError], code: int) -> None:
    assert exit_code(error("why")) == code


def test_bare_command_shows_all_commands(capsys: Captured) -> None:
    assert run([]) == GOOD
    shown = capsys.readouterr().out
    for name in ("demo", "up", "worker", "submit", "job", "cancel", "control", "status"):
        assert f" {name} " in shown


@pytest.mark.parametrize("name", ["demo", "up", "submit", "job", "cancel", "control", "status"])
def test_every_command_has_help(name: str, capsys: Captured) -> None:
    assert run([name, "--help"]) == GOOD
    assert f"rolloutq {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nonesuch"], "nonesuch"),
        (["status", "--nonesuch"], "--nonesuch"),
        (["job"], "JOB"),
        (["job", "a b"], "'a b'"),
        (["cancel"], "--run"),
        (["cancel", "j", "--run", "r"], "--run"),
        (["submit"], "--prompt"),
        (["submit", "{}", "--prompt", "hi"], "--prompt"),
        (["submit", '{"messages"'], "not valid JSON"),
        (["submit", "[1]"], "object"),
        (["submit", "@nonesuch.json"], "nonesuch.json"),
        (["submit", "--prompt", "hi", "--lane", "fast"], "fast"),
        (["submit", "--prompt", "hi", "--id", "a b", "--no-wait"], "'a b'"),
        (["submit", "--prompt", "hi", "--url", "http://somewhere"], "redis://"),
        (["status", "--pool", "No Pool"], "No Pool"),
        (["status", "--url", "nonsense"], "redis://"),
        (["control", "pause", "--wait", "-1"], "--wait"),
        (["control", "pause", "--pool", "No Pool"], "No Pool"),
        (["up", "--port", "0"], "--port"),
        (["up", "--workers", "0"], "--workers"),
        (["up", "--pool", "No Pool"], "No Pool"),
        (["demo", "--engine", "magic"], "magic"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_that_names_it(
    words: list[str], named: str, capsys: Captured
) -> None:
    assert run(words) == USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rolloutq: ")
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("url", ["http://user:geheim@host", "redis://user:geheim@127.0.0.1:1/0"])
def test_password_in_url_is_never_shown(url: str, capsys: Captured) -> None:
    assert run(["status", "--url", url]) in (USAGE, UNREACHABLE)
    out, err = capsys.readouterr()
    assert err
    assert "geheim" not in out + err


def test_version_is_that_of_the_distribution(capsys: Captured) -> None:
    assert run(["--version"]) == GOOD
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("protocol", DIALECTS)
def test_prompt_becomes_a_body_that_its_dialect_takes_whole(protocol: str) -> None:
    body = codec.encode_json(asking("hello", protocol, max_tokens=7, temperature=0))
    normal = DIALECTS[protocol].normalize(body)
    assert normal.ignored == ()
    if not normal.counts:
        assert normal.state.sample_params.max_tokens == 7
        assert normal.state.sample_params.temperature == 0
    said = [block for message in normal.state.message for block in message.content]
    assert said == [Text("hello")] or normal.state.prompt == "hello"


def test_body_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text('{"messages": []}')
    assert read_body(f"@{tmp_path / 'body.json'}") == {"messages": []}


def test_several_samples_are_numbered() -> None:
    assert texts(reply_of(sample(0, "one"))) == ["one"]
    assert texts(reply_of(sample(0, "one"), sample(1, "two"))) == ["[0] one", "[1] two"]


def test_failure_tells_what_the_reply_says() -> None:
    told = failure(refused_reply())
    assert told == "job j failed: `n`: at most 128 (invalid_request, 400)"
    assert failure(reply_of(sample(0, "good"))) is None


def test_machine_readable_reply_survives_json() -> None:
    told = codec.decode_json(codec.encode_json(fields(reply_of(sample(0, "hi", -1.0, -3.0)))))
    assert told["status"] == "completed"
    assert told["samples"][0]["tokens"] == 2
    assert told["samples"][0]["mean_logprob"] == -2.0
    assert (
        codec.decode_json(codec.encode_json(fields(refused_reply())))["error"] == "invalid_request"
    )


def test_mean_of_no_tokens_is_not_a_number() -> None:
    assert math.isnan(mean_logprob(sample(0, "")))
