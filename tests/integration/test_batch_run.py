"""`rolloutq batch run` against a real server and a scripted worker."""

import io
import json
import random
import resource
import shlex
from pathlib import Path
from typing import Any

import pytest

from producer_sdk import Client
from producer_sdk.batch.runner import Order
from producer_sdk.batch.survey import Problem, survey
from producer_sdk.batch.work import Summary, Task, work
from producer_sdk.cli import FAILED, GOOD, UNREACHABLE, USAGE
from protocols.errors import ConfigError
from tests.batch_files import answers, read_lines, scripted_row, write_lines
from tests.command import Ran, Rolloutq
from tests.job_body import chat, claude
from tests.pool_look import Look

DEAD_URL = "redis://127.0.0.1:1/0"


@pytest.fixture
def pool(standing: str) -> str:
    return standing


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten good rows."""
    return write_lines(tmp_path / "in.jsonl", map(scripted_row, range(10)))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def ran(rolloutq: Rolloutq, source: Path, output: Path, *words: str) -> Ran:
    return rolloutq("batch", "run", str(source), "-o", str(output), *words)


SHAPES: list[tuple[object, str]] = [
    ({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat("hi")}, "a"),
    ({"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "hi"}}, "b"),
    ({"custom_id": "c", "params": claude("hi")}, "c"),
    (chat("hi"), "line-4"),
    ({"prompt": "hi", "max_tokens": 8}, "line-5"),
    ({"custom_id": "f", "messages": chat("hi")["messages"], "max_tokens": 8}, "f"),
    ({"input_ids": [104, 105]}, "line-7"),
    ([104, 105], "line-8"),
    ({"prompt": "hi", "sample_params": {"max_tokens": 8}}, "line-9"),
    ({"custom_id": "j", "method": "POST", "url": "/generate", "body": {"prompt": "hi"}}, "j"),
]


def said(line: dict[str, Any]) -> str:
    """The text of an answer, in whichever shape."""
    if "result" in line:
        assert line["result"]["type"] == "succeeded"
        return line["result"]["message"]["content"][0]["text"]
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    if "samples" in body:
        return body["samples"][0]["text"]
    choice = body["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def test_every_shape_of_line_is_answered_in_that_of_its_family(
    rolloutq: Rolloutq, tmp_path: Path, output: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line for line, _ in SHAPES])
    assert ran(rolloutq, source, output).code == GOOD
    lines = {line["custom_id"]: line for line in read_lines(output)}
    assert {custom_id: said(line) for custom_id, line in lines.items()} == {
        custom_id: "hi" for _, custom_id in SHAPES
    }
    assert [custom_id for custom_id, line in lines.items() if "result" in line] == ["c"]


def test_bare_requests_have_the_protocol_that_is_told(
    rolloutq: Rolloutq, tmp_path: Path, output: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [claude("hi")])
    assert ran(rolloutq, source, output, "--protocol", "claude.messages").code == GOOD
    assert [said(line) for line in read_lines(output)] == ["hi"]


def test_standard_input_is_a_batch_that_can_be_resumed(
    rolloutq: Rolloutq, output: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
        assert ran(rolloutq, Path("-"), output).code == GOOD
    assert len(answers(output)) == 10


# what is wrong with the input

BAD: list[bytes] = [
    b"{",
    b"no json",
    b"\xff\xfe{}",
    b"null",
    b'"text"',
    b"{}",
    b"[]",
    b"[1, -1]",
    b'[1, "2"]',
    b'{"custom_id": 7, "messages": [{"role": "user", "content": "x"}]}',
    b'{"custom_id": "", "messages": [{"role": "user", "content": "x"}]}',
    b'{"custom_id": "no url", "body": {"messages": [{"role": "user", "content": "x"}]}}',
    b'{"custom_id": "u", "url": "/v1/embeddings", "body": {"input": "x"}}',
    b'{"custom_id": "g", "method": "GET", "url": "/v1/chat/completions", "body": {}}',
    b'{"custom_id": "e", "url": "/v1/chat/completions", "body": {"messages": []}}',
    b'{"custom_id": "l", "url": "/v1/chat/completions", "body": [1]}',
    b'{"custom_id": "p", "params": {"messages": [{"role": "user", "content": "x"}]}}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "x"}], "no_such_field": 1}',
    b'{"prompt": "x"} {"prompt": "y"}',
]


def spoiled(count: int, seed: int) -> tuple[list[bytes], list[int]]:
    """Lines of which some are bad or cut off somewhere, some empty and some doubled; the numbers of the bad ones."""
    chance = random.Random(seed)
    lines: list[bytes] = []
    bad: list[int] = []
    for number in range(1, count + 1):
        good = json.dumps(scripted_row(number)).encode()
        match chance.randrange(8):
            case 0:
                lines.append(chance.choice(BAD))
                bad.append(number)
            case 1:
                lines.append(good[: chance.randrange(1, len(good))])
                bad.append(number)
            case 2:
                lines.append(b"  ")
            case 3 if (1 not in bad) and lines and lines[0].strip():
                lines.append(lines[0])
                bad.append(number)
            case _:
                lines.append(good)
    return lines, bad


@pytest.mark.parametrize("seed", range(3))
def test_each_bad_line_of_a_fuzzed_file_is_told_with_its_number(
    rolloutq: Rolloutq, look: Look, tmp_path: Path, output: Path, seed: int
) -> None:
    lines, bad = spoiled(300, seed)
    assert bad
    source = write_lines(tmp_path / "in.jsonl", lines)
    before = look.job_ids()
    checked = rolloutq("batch", "run", str(source), "--check")
    told = sorted(int(line.split()[1].rstrip(":")) for line in checked.err.splitlines()[:-1])
    assert (checked.code, told) == (USAGE, bad)
    refused = ran(rolloutq, source, output)
    assert refused.code == USAGE
    assert f"{len(bad)} of " in refused.err
    assert not output.exists()
    assert look.job_ids() == before, "nothing was sent"


def test_good_rows_are_done_when_told_so_and_the_bad_ones_kept_apart(
    rolloutq: Rolloutq, tmp_path: Path, output: Path
) -> None:
    lines, bad = spoiled(200, 7)
    source = write_lines(tmp_path / "in.jsonl", lines)
    done = ran(rolloutq, source, output, "--skip-invalid", "--json")
    good = [n for n, line in enumerate(lines, 1) if line.strip() and n not in bad]
    assert done.code == FAILED
    assert set(answers(output)) == {f"row-{number}" for number in good}
    assert (done.json["done"], done.json["invalid"]) == (len(good), len(bad))
    errors = output.with_suffix(".errors.jsonl").read_bytes().splitlines()
    assert errors == [lines[number - 1] for number in bad]


def test_good_input_is_checked_without_a_server(rolloutq: Rolloutq, source: Path) -> None:
    checked = rolloutq("batch", "run", str(source), "--check", "--json", "--url", DEAD_URL)
    assert checked.code == GOOD
    assert checked.json | {"sha256": ""} == {"rows": 10, "invalid": 0, "sha256": ""}


def test_doubled_ids_are_found_among_many(tmp_path: Path) -> None:
    from producer_sdk.batch.row import Rows

    rows = [scripted_row(number) for number in range(3000)]
    rows[2500]["custom_id"] = rows[17]["custom_id"]
    problems: list[Problem] = []
    surveyed = survey(write_lines(tmp_path / "in.jsonl", rows), Rows(), report=problems.append)
    assert [problem.line for problem in problems] == [2501]
    assert "line 18" in problems[0].message
    assert (surveyed.rows, surveyed.invalid) == (3000, 1)


# exit codes


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--url", DEAD_URL), UNREACHABLE),
        (("--pool", "nobody-there", "--no-worker-s", "0.1"), UNREACHABLE),
        (("--params", "[]"), USAGE),
        (("--protocol", "morse"), USAGE),
        (("--n", "0"), USAGE),
    ],
)
def test_exit_codes_tell_who_is_at_fault(
    rolloutq: Rolloutq, source: Path, output: Path, words: tuple[str, ...], code: int
) -> None:
    assert ran(rolloutq, source, output, *words).code == code


def test_the_command_that_goes_on_can_be_pasted_and_has_no_password(
    rolloutq: Rolloutq, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["batch", "run", str(source), "-o", str(source.with_name("my answers"))]
    words += ["--params", '{"stop": ["a b"]}', "--url"]
    url = "redis://anna:s3cret@127.0.0.1:1/0?password=s3cret"
    monkeypatch.setattr("sys.argv", ["rolloutq", *words, url, "--force"])
    ended = rolloutq(*words, url)
    assert ended.code == UNREACHABLE
    assert "s3cret" not in ended.err
    told = ended.err.split("goes on from here: ")[1].splitlines()[0]
    assert shlex.split(told) == ["rolloutq", *words, "redis://127.0.0.1:1/0?password="]


def test_a_missing_file_or_output_is_bad_usage(rolloutq: Rolloutq, source: Path) -> None:
    assert rolloutq("batch", "run", str(source)).code == USAGE
    assert ran(rolloutq, source.with_name("none"), source.with_name("out.jsonl")).code == USAGE
    assert ran(rolloutq, source, Path("/nowhere/out.jsonl")).code == USAGE
    assert ran(rolloutq, source, source.with_suffix(".parquet")).code == USAGE


# failures, and what is done again


def test_failed_rows_are_told_in_both_files_and_the_others_are_done(
    rolloutq: Rolloutq, tmp_path: Path, output: Path
) -> None:
    wrong = {"custom_id": "wrong", "params": claude("x") | {"model": "no-such-model"}}
    failing = scripted_row(1, fail="error")
    source = write_lines(tmp_path / "in.jsonl", [scripted_row(0), failing, wrong])
    done = ran(rolloutq, source, output, "--json")
    assert done.code == FAILED
    assert done.json["failures"] == {"engine_failed": 1, "model_not_found": 1}
    lines = {line["custom_id"]: line for line in read_lines(output)}
    assert lines["row-1"]["error"]["code"] == "engine_failed"
    assert lines["row-1"]["response"]["status_code"] == 500
    assert lines["wrong"]["result"]["type"] == "errored"
    assert lines["wrong"]["result"]["error"]["error"]["type"] == "not_found_error"
    assert said(lines["row-0"]) == "answer 000000000"
    assert read_lines(output.with_suffix(".errors.jsonl")) == [failing, wrong]


def test_retry_errors_does_the_failed_rows_again_and_no_other(
    rolloutq: Rolloutq, client: Client, look: Look, source: Path, output: Path
) -> None:
    assert ran(rolloutq, source, output).code == GOOD
    lines = output.read_bytes().splitlines(keepends=True)
    spoiled = json.loads(lines[3]) | {"error": {"code": "cancelled", "message": "by hand"}}
    lines[3] = json.dumps(spoiled).encode() + b"\n"
    output.write_bytes(b"".join(lines) + b" " * 0)
    again = ran(rolloutq, source, output, "--json")
    assert (again.code, again.json["failures"]) == (FAILED, {"cancelled": 1})
    assert read_lines(output.with_suffix(".errors.jsonl"))[0]["custom_id"] == spoiled["custom_id"]
    before = look.job_ids()
    assert ran(rolloutq, source, output, "--retry-errors").code == GOOD
    assert look.job_ids() - before == {f"{spoiled['id']}.1"}
    assert answers(output) == {f"row-{n}": f"answer {n:09d}" for n in range(10)}
    assert not output.with_suffix(".errors.jsonl").exists()


def test_what_is_done_is_neither_sent_nor_written_again(
    rolloutq: Rolloutq, look: Look, source: Path, output: Path
) -> None:
    assert ran(rolloutq, source, output, "--limit", "4").code == GOOD
    first, before = output.read_bytes(), look.job_ids()
    done = ran(rolloutq, source, output, "--json")
    assert done.json["done"] == 10
    assert output.read_bytes().startswith(first)
    assert len(look.job_ids() - before) == 6
    assert len(answers(output)) == 10
    for line in read_lines(output):
        assert look("ZSCORE", look.keys.collected, line["id"]), "the server may forget it"


@pytest.mark.parametrize("torn", [b"{", b'{"id":"x-1","custom_id":"row-9"', b"\x00\x00\x00\n"])
def test_a_torn_end_is_cut_off(rolloutq: Rolloutq, source: Path, output: Path, torn: bytes) -> None:
    assert ran(rolloutq, source, output, "--limit", "4").code == GOOD
    with output.open("ab") as file:
        file.write(torn)
    assert ran(rolloutq, source, output).code == GOOD
    assert answers(output) == {f"row-{n}": f"answer {n:09d}" for n in range(10)}


def test_lines_that_came_to_disk_after_the_manifest_count(
    rolloutq: Rolloutq, look: Look, source: Path, output: Path
) -> None:
    manifest = output.with_suffix(".manifest.json")
    assert ran(rolloutq, source, output, "--limit", "4").code == GOOD
    earlier = manifest.read_bytes()
    assert ran(rolloutq, source, output, "--limit", "8").code == GOOD
    manifest.write_bytes(earlier)
    before = look.job_ids()
    assert ran(rolloutq, source, output).code == GOOD
    assert len(look.job_ids() - before) == 2
    assert len(answers(output)) == 10


def test_an_output_that_lost_lines_is_refused(
    rolloutq: Rolloutq, source: Path, output: Path
) -> None:
    assert ran(rolloutq, source, output).code == GOOD
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:5]))
    refused = ran(rolloutq, source, output)
    assert refused.code == USAGE
    assert "can be read" in refused.err


@pytest.mark.parametrize("words", [(), ("--retry-errors",)])
@pytest.mark.parametrize("kept_lines", [None, 5])
def test_an_output_that_lost_answers_is_left_as_it_is(
    rolloutq: Rolloutq,
    look: Look,
    source: Path,
    output: Path,
    words: tuple[str, ...],
    kept_lines: int | None,
) -> None:
    assert ran(rolloutq, source, output).code == GOOD
    if kept_lines is None:
        output.unlink()
    else:  # a line that cannot be read, and good ones behind it
        lines = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join([*lines[:kept_lines], b"?\n", *lines[kept_lines + 1 :]]))
    before, jobs = output.exists() and output.read_bytes(), look.job_ids()
    refused = ran(rolloutq, source, output, *words)
    assert refused.code == USAGE
    assert "bring it back" in refused.err
    assert (output.exists() and output.read_bytes()) == before
    assert look.job_ids() == jobs
    assert ran(rolloutq, source, output, "--force").code == GOOD


def test_parameters_that_are_lists_or_objects_are_the_same_on_resume(
    rolloutq: Rolloutq, source: Path, output: Path
) -> None:
    words = ("--params", '{"stop": ["zz", "yy"], "logit_bias": {}}')
    assert ran(rolloutq, source, output, *words, "--limit", "4").code == GOOD
    assert ran(rolloutq, source, output, *words).code == GOOD


def test_a_row_whose_collected_reply_was_lost_is_done_anew(
    rolloutq: Rolloutq, look: Look, source: Path, output: Path
) -> None:
    manifest = output.with_suffix(".manifest.json")
    assert ran(rolloutq, source, output, "--limit", "4").code == GOOD
    kept = (output.read_bytes(), manifest.read_bytes())
    assert ran(rolloutq, source, output, "--limit", "5").code == GOOD
    gone = look.keys.reply(read_lines(output)[4]["id"])
    look("HDEL", gone, "body", "state")  # what a tombstone lacks
    output.write_bytes(kept[0])
    manifest.write_bytes(kept[1])
    assert ran(rolloutq, source, output).code == GOOD
    assert answers(output) == {f"row-{n}": f"answer {n:09d}" for n in range(10)}


def test_another_input_or_other_parameters_are_refused_unless_forced(
    rolloutq: Rolloutq, source: Path, output: Path
) -> None:
    assert ran(rolloutq, source, output).code == GOOD
    refused = ran(rolloutq, source, output, "--params", '{"max_tokens": 3}')
    assert refused.code == USAGE
    assert "other parameters" in refused.err
    write_lines(source, map(scripted_row, range(3)))
    refused = ran(rolloutq, source, output)
    assert refused.code == USAGE
    assert "begun with" in refused.err
    assert len(answers(output)) == 10
    assert ran(rolloutq, source, output, "--force").code == GOOD
    assert len(answers(output)) == 3


@pytest.mark.parametrize("lines", [5, 15])
def test_an_input_that_changes_while_it_is_done_ends_the_run_or_changes_nothing(
    tmp_path: Path, output: Path, url: str, pool: str, lines: int
) -> None:
    rows = [b"{", *map(scripted_row, range(9))]
    source = write_lines(tmp_path / "in.jsonl", rows)

    def change(problem: str) -> None:  # between the check and the first row
        write_lines(source, [*rows, *map(scripted_row, range(9, 14))][:lines])

    def go() -> Summary:
        task = Task(str(source), str(output), skip_invalid=True)
        order = Order()
        return work(task, url, pool, no_worker_s=5.0, order=order, watch=lambda _: None, say=change)

    if lines < len(rows):
        with pytest.raises(ConfigError, match="has changed since it was checked: 5 rows"):
            go()
    else:
        assert go().done == 9
    assert len(answers(output)) == min(lines, len(rows)) - 1
    assert output.with_suffix(".errors.jsonl").read_bytes() == b"{\n"


def test_a_file_that_is_no_batch_of_ours_is_not_written_over(
    rolloutq: Rolloutq, source: Path, output: Path
) -> None:
    output.write_text("my notes\n")
    assert ran(rolloutq, source, output).code == USAGE
    assert output.read_text() == "my notes\n"


def test_a_smaller_limit_than_before_leaves_what_is_done(
    rolloutq: Rolloutq, source: Path, output: Path
) -> None:
    assert ran(rolloutq, source, output, "--limit", "6").code == GOOD
    done = ran(rolloutq, source, output, "--limit", "3", "--json")
    assert (done.code, done.json["rows"], done.json["waiting"]) == (GOOD, 6, 0)


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    rolloutq: Rolloutq, source: Path, output: Path
) -> None:
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, no_limit[1]))
    try:
        full = ran(rolloutq, source, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    assert full.code == FAILED
    assert "make room" in full.err
    assert ran(rolloutq, source, output).code == GOOD
    assert answers(output) == {f"row-{n}": f"answer {n:09d}" for n in range(10)}


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing_half_done(
    rolloutq: Rolloutq, tmp_path: Path, output: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [scripted_row(0, fail="error")])
    errors = output.with_suffix(".errors.jsonl")
    errors.mkdir()
    ended = ran(rolloutq, source, output)
    assert ended.code == FAILED
    assert f"{errors}: Is a directory" in ended.err
    assert not list(tmp_path.glob("*.new"))


def test_a_link_in_the_place_of_a_new_file_is_not_followed(
    rolloutq: Rolloutq, source: Path, output: Path
) -> None:
    mine = source.with_name("mine")
    mine.write_text("my notes")
    output.with_name("out.manifest.json.new").symlink_to(mine)
    assert ran(rolloutq, source, output).code == GOOD
    assert mine.read_text() == "my notes"


def test_outputs_with_dots_in_their_names_are_batches_of_their_own(
    rolloutq: Rolloutq, source: Path
) -> None:
    outputs = [source.with_name(name) for name in ("a-t0.7", "a-t0.9", "a-t0.9.jsonl")]
    assert [ran(rolloutq, source, output).code for output in outputs] == [GOOD, GOOD, USAGE]
    manifests = [json.loads(path.read_bytes()) for path in source.parent.glob("*.manifest.json")]
    assert {told["output"] for told in manifests} == {"a-t0.7", "a-t0.9"}
    refused = ran(rolloutq, source, outputs[2])
    assert "whose output is a-t0.9:" in refused.err


def test_a_batch_never_writes_over_its_input(rolloutq: Rolloutq, source: Path) -> None:
    before = source.read_bytes()
    errors = source.rename(source.with_name("out.errors.jsonl"))
    for output in (errors, source.with_name("out.jsonl")):
        assert ran(rolloutq, errors, output, "--force").code == USAGE
    assert errors.read_bytes() == before


# parameters and shapes of the output


def test_n_and_params_are_set_in_every_row(
    rolloutq: Rolloutq, tmp_path: Path, output: Path
) -> None:
    rows = [scripted_row(0), {"prompt": "long text", "sample_params": {"max_tokens": 90}}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    done = ran(rolloutq, source, output, "--n", "3", "--params", '{"max_tokens": 2}', "--json")
    assert done.code == GOOD
    assert done.json["finish_reasons"] == {"length": 6}
    bodies = {line["custom_id"]: line["response"]["body"] for line in read_lines(output)}
    assert len(bodies["row-0"]["choices"]) == 3
    assert [sample["text"] for sample in bodies["line-2"]["samples"]] == ["lo"] * 3


def test_ordered_output_is_in_the_order_of_the_input(
    rolloutq: Rolloutq, tmp_path: Path, output: Path
) -> None:
    rows = [scripted_row(n, ms_per_token=(40 - n) / 4) for n in range(40)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    assert ran(rolloutq, source, output).code == GOOD
    names = [f"row-{n}" for n in range(40)]
    assert [line["custom_id"] for line in read_lines(output)] != names
    assert ran(rolloutq, source, output, "--ordered").code == GOOD
    assert [line["custom_id"] for line in read_lines(output)] == names
    assert ran(rolloutq, source, output).code == GOOD


def test_rollouts_are_what_the_engine_saw_and_drew(
    rolloutq: Rolloutq, client: Client, tmp_path: Path, output: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [scripted_row(5), scripted_row(6, fail="error")])
    code = ran(rolloutq, source, output, "--format", "rollouts", "--n", "2").code
    assert code == FAILED
    good = [line for line in read_lines(output) if line["custom_id"] == "row-5"]
    reply = client.get(good[0]["id"]).result(30)
    for line, state in zip(good, reply.states, strict=True):
        assert line["prompt_ids"] == state.prompt_ids.tolist()
        assert line["response_ids"] == state.response_ids.tolist()
        assert line["logprobs"] == pytest.approx(list(state.logprobs))
        assert line["model_steps"] == state.response_model_steps
        assert line["finish_reason"] == state.finish_reason == "stop"
        assert (line["index"], line["of"]) == (state.index, 2)
    (bad,) = [line for line in read_lines(output) if line["custom_id"] == "row-6"]
    assert (bad["status"], bad["response_ids"]) == ("failed", [])
    assert bad["error"]["code"] == "engine_failed"
    torn = output.read_bytes()[:-5]
    manifest = output.with_suffix(".manifest.json")
    told = json.loads(manifest.read_bytes())
    told["progress"]["output_bytes"] = 0
    manifest.write_text(json.dumps(told))
    output.write_bytes(torn)
    again = ran(rolloutq, source, output, "--format", "rollouts", "--n", "2")
    assert again.code == FAILED
    assert len(read_lines(output)) == 3, "samples of a torn row are not doubled"


def test_parquet_holds_the_same_rollouts(
    rolloutq: Rolloutq, source: Path, output: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "out.parquet"
    for _ in range(2):
        assert ran(rolloutq, source, table, "--format", "rollouts").code == GOOD
    rows: list[dict[str, Any]] = parquet.read_table(table).to_pylist()
    lines = read_lines(table.with_suffix(".rows.jsonl"))
    assert len(rows) == len(lines) == 10
    for row, line in zip(rows, lines, strict=True):
        assert row["error_code"] is None
        for name in ("custom_id", "prompt_ids", "response_ids", "model_steps", "text"):
            assert row[name] == line[name]
        assert row["logprobs"] == pytest.approx(line["logprobs"])
