"""Unmodified official clients on a real model, over both doors: one answer, whole and streamed."""

from pathlib import Path
from typing import Any

import pytest

from producer_sdk import Client
from tests.http_door import Door, GatewayDoor, GatewayProcess, TransportDoor
from tests.worker_process import StartWorker

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(400)]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ASK = {"messages": QUESTION, "max_tokens": 16, "timeout": 200}


def answers(door: Door, model: str) -> list[str]:
    """The same question, asked in four ways."""
    with door.openai() as made, door.anthropic() as claude:
        asked = {**ASK, "model": model, "extra_body": {"temperature": 0}}
        chat: Any = made.chat.completions.create
        messages: Any = claude.messages.create
        whole, message = chat(**asked), messages(**asked)
        chunks, events = list(chat(**asked, stream=True)), list(messages(**asked, stream=True))
    return [
        str(whole.choices[0].message.content),
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "".join(block.text for block in message.content if block.type == "text"),
        "".join(event.delta.text for event in events if event.type == "content_block_delta"),
    ]


def test_both_clients_get_one_answer_over_both_doors(
    url: str, pool: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    start_worker(url, pool, engine="torch", slots=4, threads=1).wait_ready(240)
    with Client(url, pool=pool) as client, GatewayProcess(tmp_path, url, pool) as gateway:
        gateway.wait_ready()
        found = [*answers(TransportDoor(client), pool), *answers(GatewayDoor(gateway.url), pool)]
    assert "Paris" in found[0]
    assert found == [found[0]] * 8
