"""Rows a second and memory of `rolloutq batch run`, beside the same rows by other ways over the same workers.

    python benchmarks/batch.py [--server redis-server] [--rows 20000] [--rounds 3] [--way batch …] [--json FILE]

The ways take turns, each in a process of its own: `batch` is the runner with all that it does for durability, `map`
the same jobs through `Client.map`, `gather` is `asyncio.gather` over the gateway, as a script without a queue would
have it: all rows read, one task each, a bound of requests in flight, answers written at the end. One scripted worker
serves all.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import httpx2

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from benchmarks.gateway import RUN, free_port, running
from producer_sdk import Client, SampleParams
from producer_sdk.cli import run
from protocols.errors import RolloutError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

READY_S, LIMIT_S = 60.0, 1800.0
SLOTS = 256
IN_FLIGHT = 64
"""Of `gather`, for which 256 is slower, and 32 the same."""
TOKENS = 16


class Place(NamedTuple):
    """Where a way works."""

    url: str
    gateway: str
    source: Path
    folder: Path
    rows: int


class Took(NamedTuple):
    """One round of one way."""

    seconds: float
    rows_per_s: float
    peak_mb: float
    cpu_s: float


def message(number: int) -> list[dict[str, str]]:
    """A row's prompt."""
    return [{"role": "user", "content": f"prompt {number} {'x' * 40}"}]


def line(number: int) -> str:
    """A row, as a job of the same protocol and parameters that `Client.map` makes."""
    body = {"messages": message(number), "sample_params": {"max_tokens": TOKENS}}
    row = {"custom_id": f"row-{number}", "method": "POST", "url": "/generate", "body": body}
    return json.dumps(row)


def batch(place: Place) -> int:
    """`rolloutq batch run`."""
    output = place.folder / "out.jsonl"
    words = ("batch", "run", str(place.source), "-o", str(output), "--force", "--url", place.url)
    if run([*words, "--json"]) != 0:
        return 0
    with output.open() as lines:
        return len({json.loads(told)["custom_id"] for told in lines})


def mapped(place: Place) -> int:
    """`Client.map`."""
    prompts = (message(number) for number in range(place.rows))
    with Client(place.url) as client:
        groups = client.map(prompts, params=SampleParams(max_tokens=TOKENS))
        return sum(group.status == "completed" for group in groups)


def gather(place: Place) -> int:
    """`asyncio.gather` over HTTP."""
    return asyncio.run(_gather(place))


async def _gather(place: Place) -> int:
    rows = [json.loads(told) for told in place.source.read_text().splitlines()]
    limits = httpx2.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
    places = asyncio.Semaphore(IN_FLIGHT)
    async with httpx2.AsyncClient(base_url=place.gateway, limits=limits, timeout=600) as client:

        async def one(row: dict[str, object]) -> dict[str, object]:
            async with places:
                response = await client.post(str(row["url"]), json=row["body"])
            response.raise_for_status()
            told = {"status_code": response.status_code, "body": response.json()}
            return {"custom_id": row["custom_id"], "response": told, "error": None}

        answers = await asyncio.gather(*(one(row) for row in rows))
    text = "".join(json.dumps(answer) + "\n" for answer in answers)
    (place.folder / "gather.jsonl").write_text(text)
    return len({answer["custom_id"] for answer in answers})


WAYS: dict[str, Callable[[Place], int]] = {"batch": batch, "map": mapped, "gather": gather}


def measured(way: str, place: Place) -> Took:
    """One round in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_round, args=(way, place, theirs))
    process.start()
    theirs.close()
    if not mine.poll(LIMIT_S):
        raise RolloutError(f"{way} has not ended within {LIMIT_S:g} s")
    try:
        done, took = mine.recv()
    except EOFError:
        raise RolloutError(f"{way} broke") from None
    process.join()
    if done != place.rows:
        raise RolloutError(f"{way}: {done} of {place.rows} rows have their answer")
    return took


def _round(way: str, place: Place, told: "Connection[tuple[int, Took], None]") -> None:
    began_s = time.monotonic()
    done = WAYS[way](place)
    took_s = time.monotonic() - began_s
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak_mb = used.ru_maxrss * 1024 / 1e6
    cpu_s = used.ru_utime + used.ru_stime
    told.send((done, Took(took_s, place.rows / took_s, peak_mb, cpu_s)))


def started(options: argparse.Namespace, block: ExitStack) -> Place:
    """Server, worker and gateway, and the input."""
    folder = Path(block.enter_context(tempfile.TemporaryDirectory()))
    source = folder / "in.jsonl"
    with source.open("w") as file:
        file.writelines(f"{line(number)}\n" for number in range(options.rows))
    port, front = free_port(), free_port()
    url, gateway = f"redis://127.0.0.1:{port}/0", f"http://127.0.0.1:{front}"
    server = (options.server, "--port", str(port), "--save", "", "--dir", str(folder))
    block.enter_context(running(folder / "server.log", *server))
    worker = ("worker", "--engine", "scripted", "--slots", str(SLOTS), "--url", url)
    front_words = ("gateway", "--port", str(front), "--url", url)
    for name, words in (("worker", worker), ("gateway", front_words)):
        log = folder / f"{name}.log"
        block.enter_context(running(log, sys.executable, "-P", "-c", RUN, *words))
    give_up_at = time.monotonic() + READY_S
    while not _ready(gateway):
        if time.monotonic() > give_up_at:
            raise RolloutError("\n".join(log.read_text() for log in folder.glob("*.log")))
        time.sleep(0.2)
    return Place(url, gateway, source, folder, options.rows)


def _ready(gateway: str) -> bool:
    try:
        return httpx2.get(f"{gateway}/readyz", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--server", default=shutil.which("redis-server"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    options = parser.parse_args()
    rounds: dict[str, list[Took]] = {way: [] for way in options.way}
    with ExitStack() as block:
        place = started(options, block)
        for number in range(options.rounds):
            for way in options.way:
                took = measured(way, place)
                rounds[way].append(took)
                print(f"  round {number + 1}, {_told(way, took)}", flush=True)
    medians = {way: _median(took) for way, took in rounds.items()}
    for way, took in medians.items():
        share = took.rows_per_s / medians[options.way[0]].rows_per_s
        print(f"median, {_told(way, took)}, {share:.2f} x {options.way[0]}")
    if options.json:
        told = {way: [took._asdict() for took in all_] for way, all_ in rounds.items()}
        figures = {"rows": options.rows, "tokens": TOKENS, "rounds": told}
        record.write(options.json, figures, "redis", "httpx2")
    return 0


def _median(took: list[Took]) -> Took:
    return Took(*(statistics.median(values) for values in zip(*took, strict=True)))


def _told(way: str, took: Took) -> str:
    return (
        f"{way:6} {took.rows_per_s:7.0f} rows/s, {took.seconds:6.1f} s, peak {took.peak_mb:5.0f} MB, "
        f"{took.cpu_s:5.1f} CPU s"
    )


if __name__ == "__main__":
    sys.exit(main())
