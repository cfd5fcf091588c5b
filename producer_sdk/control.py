"""Commands to a fleet: issue one, and wait until every worker that shall obey has answered."""

import asyncio
import contextlib
import getpass
import re
import socket
import time
from collections.abc import AsyncGenerator, Sequence

import msgspec

from protocols.errors import ControlBusy, ControlIncomplete
from protocols.queue.broker import Broker
from protocols.queue.control import Answers, Issued, answers, issue

WAIT_S = 60.0
"""Also how long workers try to obey where the words do not say `timeout_s=`."""
BUSY_PAUSE_S = 0.2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5
WHO_CHARS = 128


async def control(broker: Broker, words: Sequence[str], *, by: str, wait_s: float) -> Answers:
    """The answers, once every asked worker has obeyed.

    Raises what `issue` raises, and ControlIncomplete as soon as a worker has refused, or when `wait_s` has passed.
    """
    unmet = ""
    async with contextlib.aclosing(watch(broker, words, by=by, wait_s=wait_s)) as growing:
        async for answered in growing:
            if not answered.unmet:
                return answered
            unmet = incomplete(answered)
            if len(answered.unmet) > len(answered.silent):
                break
    raise ControlIncomplete(unmet)


async def watch(
    broker: Broker, words: Sequence[str], *, by: str, wait_s: float
) -> AsyncGenerator[Answers]:
    """Issue a command; its answers as they come, at least once, until all are there or `wait_s` has passed.

    While a worker is about to be ready for it, it is issued anew. Raises what `issue` raises.
    """
    until_s = time.monotonic() + wait_s
    command = await _issue_in_time(broker, words, by=by, until_s=until_s, wait_s=wait_s)
    pause_s = FIRST_PAUSE_S
    while True:
        answered = await answers(broker, command)
        yield answered
        left_s = until_s - time.monotonic()
        if not answered.silent or left_s <= 0:
            return
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def _issue_in_time(
    broker: Broker, words: Sequence[str], *, by: str, until_s: float, wait_s: float
) -> Issued:
    """Issue a command, again while a worker is about to be ready for it; a cancel, while jobs are left."""
    patient = [*words]
    if wait_s > WAIT_S and not _says(words, "timeout_s"):
        patient.append(f"timeout_s={int(wait_s)}")
    while True:
        try:
            command = await issue(broker, patient, by=by)
            break
        except ControlBusy:
            if time.monotonic() + BUSY_PAUSE_S >= until_s:
                raise
        await asyncio.sleep(BUSY_PAUSE_S)
    while command.counts.get("left") and not _says(words, "id"):
        command = _added(command, await issue(broker, patient, by=by))
    return command


def _says(words: Sequence[str], option: str) -> bool:
    return any(word.startswith(f"{option}=") for word in words)


def _added(earlier: Issued, later: Issued) -> Issued:
    counts = {name: count + earlier.counts[name] for name, count in later.counts.items()}
    return msgspec.structs.replace(later, counts=counts | {"left": later.counts["left"]})


def incomplete(answered: Answers) -> str:
    """Who has not obeyed, and why."""
    command, unmet = answered.command, answered.unmet
    done = len(answered.asked) - len(unmet)
    told = "; ".join(f"{worker}: {why}" for worker, why in sorted(unmet.items()))
    standing = "" if command.generation is None else "; the order stands, and who wakes follows it"
    return f"{command.said}: {done} of {len(answered.asked)} workers have done it; {told}{standing}"


def who() -> str:
    """`user@host`, of letters that the audit takes."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "?"
    return re.sub(r"[^A-Za-z0-9._@-]", "-", f"{user}@{socket.gethostname()}")[:WHO_CHARS]
