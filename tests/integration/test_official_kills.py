"""Streams of unmodified clients whose worker is killed, over both doors: they say what they would have said."""

import threading
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from producer_sdk import Client
from tests.http_door import Door, GatewayDoor, GatewayProcess, TransportDoor
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve

TEXT = "Es war einmal, 从前有座山, once upon a time: " * 4
KILLED_AT_TOKENS = (1, 7, 20, 45, 90)
LEASE_S, LIMIT_S = 0.9, 60


class Reading:
    """A stream of an official client, read in a thread."""

    def __init__(self, door: Door, kind: str, job_id: str) -> None:
        self.job_id, self.text = job_id, ""
        self._door, self._kind = door, kind
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        made: Any = self._door.openai() if self._kind == "openai" else self._door.anthropic()
        create = made.chat.completions.create if self._kind == "openai" else made.messages.create
        with made:
            for chunk in create(
                model="scripted",
                max_tokens=1000,
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                timeout=LIMIT_S,
                extra_headers={"x-rollout-job-id": self.job_id},
                extra_body={"rollout": {"script": {"text": TEXT, "ms_per_token": 15}}},
            ):
                self.text += self._said(chunk)

    def _said(self, chunk: Any) -> str:  # noqa: ANN401 - of either client
        if self._kind == "openai":
            return chunk.choices[0].delta.content or ""
        return getattr(getattr(chunk, "delta", None), "text", "")

    def reached(self, look: Look, at_token: int) -> bool:
        """Whether the server has so many tokens, and the client some."""
        return bool(self.text) and int(look.reply(self.job_id).get("kept:0", 0)) >= at_token

    def whole(self) -> str:
        """Once it has ended."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return self.text


def test_streams_over_both_doors_outlive_a_worker_killed_at_five_different_tokens(
    client: Client, serve: Serve, look: Look, url: str, pool: str, tmp_path: Path
) -> None:
    with GatewayProcess(tmp_path, url, pool) as gateway:
        gateway.wait_ready()
        ways = list(
            product((TransportDoor(client), GatewayDoor(gateway.url)), ("openai", "anthropic"))
        )

        def begun(name: str) -> list[Reading]:
            return [Reading(door, kind, f"{name}-{door.name}-{kind}") for door, kind in ways]

        worker = serve(lease_s=LEASE_S, slots=len(ways))
        undisturbed = [reading.whole() for reading in begun("undisturbed")]
        for at_token in KILLED_AT_TOKENS:
            readings = begun(f"at-{at_token}")
            for one in readings:
                wait_until(partial(one.reached, look, at_token), f"{at_token} tokens are shown")
            worker.kill()
            assert all(0 < len(one.text) < len(TEXT) for one in readings)
            worker = serve(lease_s=LEASE_S, slots=len(ways))
            assert [one.whole() for one in readings] == undisturbed
            assert {look.reply(one.job_id)["attempts"] for one in readings} == {"2"}
    assert undisturbed == [TEXT] * len(ways)
