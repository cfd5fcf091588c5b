"""Follows the desired state, and answers commands. Lives in the lease keeper's thread, which generation cannot block.

It knows what the pool shall do and what the worker is doing; `protocols.control.next_step` says what comes next, and
`Steps` does it in the worker's own event loop. One step is under way at a time, each has a limit, and while it lasts
questions are answered all the same.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from protocols import codec
from protocols.control import (
    Ack,
    Command,
    Desired,
    Memory,
    Result,
    Step,
    default_desired,
    next_step,
    reached,
    settled,
)
from protocols.errors import RolloutError
from protocols.queue.control import command_of
from protocols.queue.rows import Beaten
from worker.steps import Steps

FRESH_WAIT_S = 3.0
"""How long a worker that has never seen a desired state waits for one that has, before it writes the default."""
POLL_S = 0.05

Facts = Mapping[str, str | int]

log = logging.getLogger("rolloutq.control")


class Heard(msgspec.Struct):
    """A command that waits for its answer."""

    command: Command
    heard_s: float
    left_s: float


class Trouble(NamedTuple):
    """A step that failed; it is not tried again before another order of its name, or other weights."""

    step: Step
    target: "Target"
    why: str


Target = tuple[Memory, int | None, str | None, str | None]


def _target(wanted: Desired) -> Target:
    """What a failed step depended on."""
    return wanted.memory, wanted.weights, wanted.uri, wanted.sha256


class Controller:
    """Of one worker."""

    def __init__(self, worker: str, steps: Steps, facts: Callable[[str], Facts]) -> None:
        """`facts` tells what a question asks for, by its verb."""
        self._worker, self._steps, self._facts = worker, steps, facts
        self._known: dict[str, str] = {}
        self._since = time.monotonic()
        self._waiting: list[Heard] = []
        self._answers: dict[str, bytes] = {}
        self._news = asyncio.Event()
        self._answered: Callable[[], object] = lambda: None
        self.wanted: Desired | None = None
        self._doing: Step | None = None
        self._trouble: Trouble | None = None

    @property
    def trouble(self) -> str:
        """Why a step towards what is wanted failed; a new order of its name tries again."""
        return self._trouble.why if self._trouble else ""

    @property
    def doing(self) -> str:
        """The step under way, or the one that comes next; empty where there is none, or it cannot be taken."""
        if self._doing or self.wanted is None or not self._steps.ready:
            return self._doing or ""
        return self._next(self.wanted) or ""

    def _next(self, wanted: Desired) -> Step | None:
        """The step that can be taken now."""
        step = next_step(self._steps.standing(), wanted)
        return None if self._failed(step) else step

    def _failed(self, step: str | None) -> bool:
        return self._trouble is not None and self._trouble.step == step

    def to_restore(self) -> dict[str, str] | None:
        """What to write where the server has no desired state: what was known, or after a while the default."""
        if self._known:
            return self._known
        if time.monotonic() - self._since >= FRESH_WAIT_S:
            return default_desired()
        return None

    def answers(self) -> dict[str, bytes]:
        """Those that are to be sent, by command."""
        return dict(self._answers)

    def sent(self, answers: Mapping[str, bytes]) -> None:
        """These have arrived."""
        for command_id in answers:
            self._answers.pop(command_id, None)

    def hear(self, told: Beaten) -> None:
        """Take in the desired state, where there is one, and new commands."""
        if told.desired and told.desired != self._known:
            self._want(told.desired)
        for command in filter(None, map(command_of, told.news)):
            if command.worker in (None, self._worker) and command.verb != "cancel":
                self._heed(command, told.now_ms)
        self._news.set()

    def _want(self, desired: dict[str, str]) -> None:
        try:
            self.wanted = Desired.of(desired, self._worker)
        except msgspec.ValidationError as error:
            # somebody wrote it by hand: the control step would not
            log.warning("the desired state is none (%s); following the one before", error)
            return
        self._known = desired
        if self._trouble and self._trouble.target != _target(self.wanted):
            self._trouble = None

    def _heed(self, command: Command, now_ms: int) -> None:
        left_s = (command.until_ms - now_ms) / 1000
        if left_s <= 0 and command.generation is None:
            return  # a question or a shutdown that is too old; an order stands in the desired state
        heard = Heard(command, time.monotonic(), left_s)
        if command.generation is not None:
            self._waiting.append(heard)
            self._trouble = None if self._failed(command.verb) else self._trouble
            return
        log.info("%s asks: %s", command.by, command.said)
        self._answer(heard, "applied", facts=self._facts(command.verb))
        if command.verb == "shutdown":
            self._steps.leave(now=command.options.get("now") == "true")

    def _answer(
        self, heard: Heard, result: Result, why: str = "", facts: Facts | None = None
    ) -> None:
        now = self._steps.standing()
        ack = Ack(
            result=result,
            state=self._steps.state(),
            running=now.running,
            held=now.held,
            version=now.version,
            ms=int(1000 * (time.monotonic() - heard.heard_s)),
            why=why,
            facts=dict(facts or {}),
        )
        self._answers[heard.command.id] = codec.encode_json(ack)
        self._answered()

    async def run(self, answered: Callable[[], object]) -> None:
        """Follow until cancelled; `answered` is called when an answer is to be sent."""
        self._answered = answered
        while True:
            await self._wait()
            if self.wanted is None:
                continue
            if self._steps.ready:
                await self._follow(self.wanted)
                self._judge(self.wanted)
            else:
                self._judge_unready(self.wanted)

    async def _wait(self) -> None:
        """For news; while orders are under way, for a moment."""
        try:
            async with asyncio.timeout(POLL_S if self._under_way else None):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()

    @property
    def _under_way(self) -> bool:
        unsettled = self.wanted is None or not settled(self._steps.standing(), self.wanted)
        return bool(self._waiting) or (unsettled and not self._trouble)

    async def _follow(self, wanted: Desired) -> None:
        """Take the steps that lead there, as far as they go now; a newer wish is followed instead."""
        while self.wanted is wanted and (step := self._next(wanted)):
            self._doing = step
            self._answered()
            failure = await self._take(step, wanted)
            self._doing = None
            if failure:
                self._trouble = Trouble(step, _target(wanted), failure)
                log.warning("generation %s: %s failed: %s", wanted.generation, step, failure)
            self._answered()

    async def _take(self, step: Step, wanted: Desired) -> str:
        """Why it failed; empty where it did not."""
        try:
            await self._steps.take(step, wanted)
        except RolloutError as error:
            return error.message
        except TimeoutError:
            return f"{step} did not end in time"
        log.info("generation %s: %s is done", wanted.generation, step)
        return ""

    def _judge_unready(self, wanted: Desired) -> None:
        """Answer while no step can be taken: who starts takes no jobs, which is a pause; who leaves obeys no more."""
        waiting, self._waiting = self._waiting, []
        for heard in waiting:
            command, life = heard.command, self._steps.life
            known = (command.generation or 0) <= wanted.generation
            if life != "starting":
                self._answer(heard, "refused", f"it is {life}")
            elif command.verb == "pause" and known and command.still_wanted(wanted):
                self._answer(heard, "applied")
            else:
                self._waiting.append(heard)

    def _judge(self, wanted: Desired) -> None:
        """Answer the orders that are done, replaced, refused or overdue."""
        waiting, self._waiting = self._waiting, []
        now = self._steps.standing()
        for heard in waiting:
            command = heard.command
            if (command.generation or 0) > wanted.generation:
                self._waiting.append(heard)
            elif not command.still_wanted(wanted):
                later = f"generation {wanted.generation} wants something else"
                self._answer(heard, "superseded", later)
            elif reached(command.verb, now, wanted):
                self._answer(heard, "applied")
            elif self._failed(command.verb):
                self._answer(heard, "refused", self.trouble)
            elif time.monotonic() - heard.heard_s >= heard.left_s:
                late = f"not done in time; {now.running} jobs are still running"
                self._answer(heard, "refused", late)
            else:
                self._waiting.append(heard)
