"""What waiting costs: an idle worker and client, and one job that arrives among 200 idle workers.

    python benchmarks/idle.py [--server redis-server] [--workers 200] [--seconds 20] [--json FILE]

Two figures: the CPU time of an idle worker process (scripted engine) and of an idle client, as parts of a core; and
the commands that the server gets because of one job among many idle workers, once by XADD and once by the SDK. MONITOR
tells all commands: those of the client, of the worker that does the job, and of workers that stopped waiting before
their wait was over. What workers say anyway, once in a while, is not the job's: heartbeats, sweeps, renewals, and a
wait that has run out with the look for jobs that follows.
"""

import argparse
import asyncio
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages of this tree, not installed

from benchmarks.machine import admin, cpu_s, server, started, until, write_down
from benchmarks.queue_overhead import echo_worker, payload_of, states_of
from producer_sdk import Client
from protocols.codec import encode_json
from protocols.control import default_desired
from worker.consumer import BELL_S

HERE = Path(__file__)
POOL = "default"
PREFIX = f"rollout:{{{POOL}}}"
A_PROCESS = 50
MOST_CORE, MOST_COMMANDS = 0.01, 10
SETTLE_S, WATCH_S = 5.0, 1.5
ANYWAY = ("rolloutq_beat", "rolloutq_sweep", "rolloutq_renew")


class Said(NamedTuple):
    """A command as MONITOR tells it."""

    at_s: float
    connection: str
    words: list[str]

    @property
    def name(self) -> str:
        """What is counted: the function's name of a call."""
        return self.words[1] if self.words[0] == "FCALL" else self.words[0]

    @property
    def waits(self) -> bool:
        """Whether it is a worker's wait for a job."""
        return self.words[0] == "XREADGROUP"


def idle_cores(port: int, url: str, seconds: float) -> dict[str, float]:
    """Parts of a core that an idle worker and an idle client use."""
    look = admin(port)
    worker = started("-Pm", "worker", "--engine=scripted", f"--url={url}", f"--pool={POOL}")
    client = started(str(HERE), "--role=client", f"--url={url}")
    try:
        until(lambda: states_of(look, POOL) == [b"serving"])
        time.sleep(SETTLE_S)
        pids = {"worker": worker.pid, "client": client.pid}
        before = {who: cpu_s(pid) for who, pid in pids.items()}
        time.sleep(seconds)
        return {who: (cpu_s(pid) - before[who]) / seconds for who, pid in pids.items()}
    finally:
        for process in (worker, client):
            process.terminate()
            process.wait(30)


async def wait_idle(url: str) -> None:
    """A client that has had a reply, and waits for no other."""
    async with Client(url, pool=POOL) as client:
        await client.submit(payload_of(2048))
        await asyncio.Event().wait()


async def many_workers(url: str, count: int, number: int) -> None:
    """Idle workers in this process, the `number`th, each with all its connections and its thread."""
    await asyncio.gather(*(echo_worker(url, POOL, 1, f"idle-{number}-{n}") for n in range(count)))


def commands_of_a_job(port: int, url: str, workers: int) -> dict[str, dict[str, int]]:
    """For each way to bring a job, the commands that it caused, by name."""
    look = admin(port)
    each = [min(A_PROCESS, workers - first) for first in range(0, workers, A_PROCESS)]
    fleet = [
        started(str(HERE), "--role=workers", f"--url={url}", f"--count={n}", f"--first={at}")
        for at, n in enumerate(each)
    ]
    try:
        until(lambda: states_of(look, POOL).count(b"serving") >= workers)
        time.sleep(SETTLE_S)
        body = encode_json(payload_of(2048))
        raw = _caused(port, lambda: look.xadd(f"{PREFIX}:jobs:normal", {"body": body}))
        with Client(url, pool=POOL) as client:
            client.submit(payload_of(2048)).result(30)
            time.sleep(SETTLE_S)
            sdk = _caused(port, lambda: client.submit(payload_of(2048)).result(30))
        return {"XADD": raw, "SDK": sdk}
    finally:
        for process in fleet:
            process.terminate()
            process.wait(60)


def _caused(port: int, bring: Any) -> dict[str, int]:  # noqa: ANN401 - any call
    """Commands because of what `bring` brings, by name."""
    with admin(port).monitor() as monitor:
        said: list[Said] = []

        def listen(until_s: float) -> None:
            while time.time() < until_s:
                told = monitor.next_command()
                if told["client_type"] != "lua":
                    connection = f"{told['client_address']}:{told['client_port']}"
                    said.append(Said(told["time"], connection, told["command"].split()))

        listen(time.time() + 2 * BELL_S)  # every worker has begun a wait
        brought_s = time.time()
        bring()
        listen(brought_s + WATCH_S)
    return dict(Counter(one.name for one in _because(said, brought_s)))


def _because(said: list[Said], brought_s: float) -> list[Said]:
    waits_since: dict[str, float] = {}
    early: set[str] = set()
    caused: list[Said] = []
    for one in said:
        since = waits_since.pop(one.connection, None)
        if since is not None and one.at_s - since < BELL_S:
            early.add(one.connection)
        if one.waits:
            waits_since[one.connection] = one.at_s
        due = since is not None or one.waits or one.name == "rolloutq_take"
        if one.at_s < brought_s or one.name in ANYWAY or (due and one.connection not in early):
            continue
        caused.append(one)
    return caused


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description="What waiting costs.")
    parser.add_argument("--server", default=shutil.which("redis-server"), help="its binary")
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    for hidden in ("--role", "--url"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--count", "--first"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "client":
        asyncio.run(wait_idle(options.url))
    elif options.role == "workers":
        asyncio.run(many_workers(options.url, options.count, options.first))
    elif not options.server:
        sys.exit("no redis-server on the PATH: name one with --server")
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Both figures."""
    with server(options.server) as port:
        url = f"redis://127.0.0.1:{port}/0"
        admin(port).hset(f"{PREFIX}:desired", mapping=default_desired())
        cores = idle_cores(port, url, options.seconds)
        for who, part in cores.items():
            told = _told(part < MOST_CORE)
            print(f"idle {who}: {100 * part:.2f} % of a core < {100 * MOST_CORE:g} %: {told}")
        commands = commands_of_a_job(port, url, options.workers)
    for how, names in commands.items():
        count = sum(names.values())
        told = _told(count <= MOST_COMMANDS)
        print(f"one job by {how}, {options.workers} idle workers: {count} commands", end=" ")
        print(f"<= {MOST_COMMANDS}: {told}  {names}")
    write_down(options.json, options.server, {"busy": cores, "commands": commands})


def _told(good: bool) -> str:
    return "met" if good else "MISSED"


if __name__ == "__main__":
    main()
