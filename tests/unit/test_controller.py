"""Which orders a worker answers while it can take no step."""

import asyncio
from typing import Literal

import msgspec
import pytest

from protocols.control import Ack, Standing, default_desired
from protocols.queue.rows import Beaten
from worker.controller import Controller
from worker.steps import Life, Steps

PAUSED = {**default_desired(), "gate": "closed", "generation": "1"}


class Unready(Steps):
    """Steps of a worker that starts or leaves."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def standing(self) -> Standing:
        return Standing("closed", None, "loaded", 0, 0, 0)


def order(said: str, generation: int) -> list[object]:
    fields = {
        "said": said,
        "verb": said.partition(" ")[0],
        "generation": str(generation),
        "until_ms": "60000",
        "by": "me",
    }
    return [b"c", [part.encode() for pair in fields.items() for part in pair]]


async def answer(life: Life, desired: dict[str, str], said: str) -> Ack | None:
    """What the worker answers within a moment; None while it does not."""
    controller = Controller("w", Unready(life), lambda _: {})
    following = asyncio.create_task(controller.run(lambda: None))
    controller.hear(Beaten(0, desired, "1-0", [order(said, int(desired["generation"]))]))
    for _ in range(5):
        await asyncio.sleep(0)
    following.cancel()
    told = controller.answers().get("c")
    return msgspec.json.decode(told, type=Ack) if told else None


async def test_a_worker_that_starts_takes_nothing_which_is_a_pause() -> None:
    ack = await answer("starting", PAUSED, "pause")
    assert ack is not None
    assert (ack.result, ack.state) == ("applied", "starting")


@pytest.mark.parametrize("said", ["onload", "continue"])
async def test_a_worker_that_starts_answers_other_orders_when_it_serves(said: str) -> None:
    assert await answer("starting", PAUSED, said) is None


@pytest.mark.parametrize("life", ["draining", "stopped"])
async def test_a_worker_that_leaves_refuses_orders(life: Literal["draining", "stopped"]) -> None:
    ack = await answer(life, PAUSED, "pause")
    assert ack is not None
    assert (ack.result, ack.why) == ("refused", f"it is {life}")
