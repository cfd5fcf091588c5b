"""`rolloutq worker --engine lmdeploy --gpus …`: lmdeploy's own engine in each of the launcher's processes."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis

from producer_sdk import Client
from protocols.rollout_state import RolloutState
from tests.command import CommandProcess
from tests.lmdeploy.summary import Show
from tests.plain_model import PlainModel, of_tokens
from tests.tiny_model import save_tiny_model

LOAD_S, ANSWER_S = 240.0, 240.0
TOLERATED = 1e-4
PROMPT = list(range(5, 25))
TOKENS = 200
SHIM = Path(__file__).parent / "launched"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny-llama")


@pytest.fixture
def launcher(tmp_path: Path, url: str, pool: str, model: Path) -> Iterator[CommandProcess]:
    words = ("--engine", "lmdeploy", "--model", str(model), "--gpus", "0-1", "--tp", "1")
    ours = ("--url", url, "--pool", pool, "--worker-id", "box", "--slots", "1")
    with CommandProcess(tmp_path, "worker", *words, *ours, path=[SHIM]) as started:
        yield started


def workers(launcher: CommandProcess) -> dict[str, psutil.Process]:
    """The worker processes, by id."""
    found = {words[-1]: one for one in launcher.children() if (words := one.cmdline())}
    return {name: one for name, one in found.items() if name.startswith("box-")}


def answers_until_all_serve(client: Client, ids: set[str]) -> dict[str | None, RolloutState]:
    """Two jobs at a time until each of these workers, which have one slot each, has answered one; an answer of each."""
    params = {"max_tokens": TOKENS, "min_tokens": TOKENS}
    body = {"input_ids": PROMPT, "sample_params": params}
    deadline = time.monotonic() + ANSWER_S
    found: dict[str | None, RolloutState] = {}
    while set(found) != ids:
        assert time.monotonic() < deadline, f"only {set(found)} of {ids} answered"
        for future in [client.submit(body, protocol="generate") for _ in ids]:
            reply = future.result(ANSWER_S)
            reply.raise_for_status()
            found[reply.worker] = reply.states[0]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_workers_serve_and_one_that_is_killed_is_replaced_and_serves_again(
    launcher: CommandProcess, url: str, pool: str, model: Path, show: Show
) -> None:
    launcher.wait_for("ready: 2 workers", LOAD_S)
    plain = PlainModel(model)
    with Client(url, pool=pool) as client:
        for ids in ({"box-0", "box-1"}, {"box-0.2", "box-1"}):
            for worker, state in answers_until_all_serve(client, ids).items():
                (expected,) = plain.logprobs([PROMPT], [state.response_ids])
                drawn = of_tokens(expected, state.response_ids)
                farthest = max(abs(a - b) for a, b in zip(state.logprobs, drawn, strict=True))
                assert farthest <= TOLERATED
                show(
                    f"launcher: {worker} drew {TOKENS} tokens, within {farthest:.1e} of transformers"
                )
            if "box-0" in ids:
                _kill_and_see_it_replaced(launcher, url, pool, show)
    launcher.signal(signal.SIGTERM)
    assert launcher.wait() == 0
    assert launcher.left() == []


def _kill_and_see_it_replaced(launcher: CommandProcess, url: str, pool: str, show: Show) -> None:
    before = workers(launcher)
    os.kill(before["box-0"].pid, signal.SIGKILL)
    launcher.wait_for("worker box-0 was ended by SIGKILL; another starts in 0.5 s")
    with Redis.from_url(url, protocol=2, decode_responses=True) as redis:  # pyright: ignore[reportUnknownMemberType]
        key = f"rollout:{{{pool}}}:worker:box-0.2"
        launcher.wait_until(
            lambda: redis.hget(key, "state") == "serving", "a second worker on GPU 0", LOAD_S
        )
    after = workers(launcher)
    assert set(after) == {"box-0.2", "box-1"}
    assert after["box-1"].pid == before["box-1"].pid
    devices = {name: one.environ()["CUDA_VISIBLE_DEVICES"] for name, one in after.items()}
    assert devices == {"box-0.2": "0", "box-1": "1"}
    show("launcher: box-0 was killed by SIGKILL; box-0.2 came up on its GPU")
