"""A batch of real prompts on the real model, its runner killed on the way."""

import signal
from pathlib import Path

import pytest

from tests.batch_files import of_workers, read_lines, write_lines
from tests.command import CommandProcess
from tests.form import FULL_BATCHES
from tests.pool_look import Look, wait_until
from tests.worker_process import StartWorker

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPTS = Path(__file__).parents[1] / "golden/prompts_100.txt"
WAYS = (
    *("", "Answer in one word.", "Be brief.", "Think of a child who asks.", "Say it in French."),
    *("Answer as a poet.", "Answer as a teacher.", "Answer with a number.", "Explain.", "Why?"),
    *("Give an example.", "Give no example.", "Use plain words.", "Use long words.", "Doubt it."),
    *("Answer with a question.", "Say it twice.", "Only the first letter.", "Be kind.", "Be dry."),
)
ROWS = 2000 if FULL_BATCHES else 40
END_S = 1500.0


def test_every_prompt_is_answered_once_by_the_model(
    start_worker: StartWorker, tmp_path: Path, url: str, pool: str
) -> None:
    worker = start_worker(url, pool, engine="torch", slots=16, threads=1)
    prompts = PROMPTS.read_text().splitlines()
    asked = [f"{prompt} {way}".strip() for way in WAYS for prompt in prompts][:ROWS]
    assert len(set(asked)) == ROWS
    rows = (
        {
            "custom_id": f"row-{number}",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 4,
            "temperature": 0,
        }
        for number, text in enumerate(asked)
    )
    output = tmp_path / "out.jsonl"
    words = ["batch", "run", str(write_lines(tmp_path / "in.jsonl", rows)), "-o", str(output)]
    words += ["--format", "rollouts", "--url", url, "--pool", pool]
    worker.wait_ready(240)
    look = Look(url, pool)
    with CommandProcess(tmp_path, *words) as runner:
        runner.wait_until(lambda: output.exists() and output.stat().st_size, "a block", 120)
        runner.signal(signal.SIGSTOP)
        assert look.length("low") > 0, "rows were in flight when it was killed"
        runner.kill()
    with CommandProcess(tmp_path, *words) as runner:
        assert runner.wait(END_S) == 0, runner.output
        print(runner.output)  # noqa: T201 - shown with -s
    lines = read_lines(output)
    assert sorted(line["custom_id"] for line in lines) == sorted(f"row-{n}" for n in range(ROWS))
    assert all(len(line["logprobs"]) == len(line["response_ids"]) > 0 for line in lines)
    (paris,) = [line["text"] for line in lines if line["custom_id"] == "row-0"]
    assert "capital" in paris or "Paris" in paris
    wait_until(lambda: of_workers(look, "finished_jobs") >= ROWS, "the last heartbeat")
    assert of_workers(look, "finished_jobs") == ROWS
    drawn = sum(len(line["response_ids"]) for line in lines)
    assert of_workers(look, "generated_tokens") == drawn
    look.close()
