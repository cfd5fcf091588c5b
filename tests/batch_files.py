"""Inputs and outputs of batches, as tests write and read them."""

import json
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.command import CommandProcess
from tests.pool_look import Look

TOKENS = 17
"""Of each scripted answer: 16 bytes and the end."""
KILL_WITHIN_S = 1.2


def scripted_row(number: int, *, ms_per_token: float = 0, **script: object) -> dict[str, Any]:
    """A batch line of OpenAI's whose answer names its row."""
    told = {"text": f"answer {number:09d}", "ms_per_token": ms_per_token, **script}
    body = {
        "messages": [{"role": "user", "content": f"question {number}"}],
        "rollout": {"script": told},
    }
    return {
        "custom_id": f"row-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }


def write_lines(path: Path, lines: Iterable[object]) -> Path:
    """One JSON value a line; bytes as they are."""
    with path.open("wb") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode())
            file.write(b"\n")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an output."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answers(path: Path) -> dict[str, str]:
    """Text by custom id of an output in OpenAI's shape; the test fails where an id comes twice."""
    found: dict[str, str] = {}
    for line in read_lines(path):
        assert line["custom_id"] not in found, f"{line['custom_id']} came twice"
        assert line["error"] is None, line["error"]
        choice = line["response"]["body"]["choices"][0]
        found[line["custom_id"]] = choice["message"]["content"]
    return found


def of_workers(look: Look, field: str) -> int:
    """The sum of a field over the heartbeats of all workers that there were."""
    ids: list[bytes] = look("ZRANGE", look.keys.workers, 0, -1)
    return sum(int(look("HGET", look.keys.worker(one.decode()), field) or 0) for one in ids)


def kill_in_flight(process: CommandProcess, look: Look) -> None:
    """SIGKILL it at some moment when it has a client connected and rows are in flight; it stands still just before."""
    client = f"client:{process.pid}-"
    while True:
        process.wait_until(
            lambda: look.is_connected(client) and look.length("low"), "a row in flight"
        )
        time.sleep(random.uniform(0, KILL_WITHIN_S))
        process.signal(signal.SIGSTOP)
        if look.is_connected(client) and look.length("low"):
            process.kill()
            return
        process.signal(signal.SIGCONT)
