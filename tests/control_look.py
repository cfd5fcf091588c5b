"""Commands as an operator with nothing but redis-cli gives them, and the answers as they lie in Redis."""

import json
import subprocess
from typing import Any

from tests.pool_look import Look, wait_until

Ack = dict[str, Any]


def order(look: Look, *words: str) -> dict[str, str]:
    """Give a command; what the step answers. A refusal raises redis-py's ResponseError."""
    flat = look("FCALL", "rolloutq_control", 1, look.keys.prefix, *words)
    told = [part.decode() if isinstance(part, bytes) else str(part) for part in flat]
    return dict(zip(told[::2], told[1::2], strict=True))


def acks(look: Look, command_id: str) -> dict[str, Ack]:
    """The answers to a command so far, by worker."""
    told: dict[bytes, bytes] = look("HGETALL", look.keys.acks(command_id))
    return {
        name.decode(): json.loads(value)
        for name, value in told.items()
        if not name.startswith(b"@")
    }


def obeyed(look: Look, *words: str, timeout_s: float = 30.0) -> dict[str, Ack]:
    """Give a command, and wait until every worker that is asked has applied it; their answers."""
    issued = order(look, *words)
    asked = issued["workers"].split()
    wait_until(
        lambda: len(acks(look, issued["command"])) == len(asked),
        f"all of {asked} answer {' '.join(words)}",
        timeout_s=timeout_s,
    )
    answers = acks(look, issued["command"])
    assert {answer["result"] for answer in answers.values()} <= {"applied"}, answers
    return answers


def fact(look: Look, worker: str, name: str) -> str:
    """What a worker says of itself."""
    found = look("HGET", look.keys.worker(worker), name)
    return "" if found is None else found.decode()


def redis_cli(url: str, *words: str) -> str:
    """What Debian's redis-cli prints."""
    told = subprocess.run(
        ["redis-cli", "-u", url, *words], check=True, capture_output=True, text=True, timeout=30
    )
    return told.stdout.strip()
