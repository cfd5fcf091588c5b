"""What 100,000 jobs leave behind in a worker and a client, and how 10,000 in flight from one client come back.

    python benchmarks/queue_memory.py [--server redis-server] [--jobs 100000] [--in-flight 10000] [--json FILE]

One client and one worker with an echo handler, a server of their own, 2 KB bodies. Two figures: memory (RSS) of both
after all jobs, beside that after a tenth of them, 256 in flight; then the 99th percentile of the time from submission
to reply with many in flight, beside the time that so many take at the measured rate.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import time
from array import array
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages of this tree, not installed

from benchmarks.machine import admin, rss_mb, server, started, until, write_down
from benchmarks.queue_overhead import payload_of, states_of
from producer_sdk import Client
from protocols.control import default_desired

HERE = Path(__file__)
POOL = "default"
WINDOW = 256
MOST_GROWTH, MOST_WAIT = 1.10, 2.0


async def run_jobs(client: Client, jobs: int, in_flight: int, waits_s: "array[float]") -> float:
    """Jobs a second, so many in flight; `waits_s` gets the time from submission to reply of each."""
    gate, payload = asyncio.Semaphore(in_flight), payload_of(2048)

    async def one() -> None:
        async with gate:
            began_s = time.perf_counter()
            (await client.submit(payload)).raise_for_status()
            waits_s.append(time.perf_counter() - began_s)

    began_s = time.perf_counter()
    left = jobs
    while left > 0:  # in portions, so that the tasks of this benchmark are not what is measured
        portion = min(left, max(in_flight, 5000))
        await asyncio.gather(*(one() for _ in range(portion)))
        left -= portion
    return jobs / (time.perf_counter() - began_s)


async def produce(url: str, worker_pid: int, jobs: int, in_flight: int) -> None:
    """Print the figures as one JSON line."""

    def memory() -> dict[str, float]:
        return {"client_mb": rss_mb(os.getpid()), "worker_mb": rss_mb(worker_pid)}

    async with Client(url, pool=POOL) as client:
        await run_jobs(client, jobs // 10, WINDOW, array("d"))
        early = memory()
        await run_jobs(client, jobs - jobs // 10, WINDOW, array("d"))
        late = memory()
        waits_s = array("d")
        rate = await run_jobs(client, 3 * in_flight, in_flight, waits_s)
    p99_s = statistics.quantiles(waits_s, n=100)[98]
    times = {"p99_s": p99_s, "jobs_per_s": rate, "in_flight_s": in_flight / rate}
    print(json.dumps({"early": early, "late": late, "times": times}))


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description="Memory and waits of many jobs.")
    parser.add_argument("--server", default=shutil.which("redis-server"), help="its binary")
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--in-flight", type=int, default=10_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--worker-pid", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.url:
        asyncio.run(produce(options.url, options.worker_pid, options.jobs, options.in_flight))
        return
    if not options.server:
        sys.exit("no redis-server on the PATH: name one with --server")
    with server(options.server) as port:
        figures = measured(port, options.jobs, options.in_flight)
    for who in ("client", "worker"):
        early, late = (figures[when][f"{who}_mb"] for when in ("early", "late"))
        print(
            f"{who}: {early:.1f} MB after {options.jobs // 10} jobs, {late:.1f} MB after {options.jobs}:"
            f" {late / early:.2f} <= {MOST_GROWTH}: {_told(late <= early * MOST_GROWTH)}"
        )
    times = figures["times"]
    p99_s, in_flight_s = times["p99_s"], times["in_flight_s"]
    print(
        f"{options.in_flight} in flight at {times['jobs_per_s']:.0f} jobs/s: p99 {p99_s:.2f} s,"
        f" {p99_s / in_flight_s:.2f} of {in_flight_s:.2f} s <= {MOST_WAIT}:"
        f" {_told(p99_s <= MOST_WAIT * in_flight_s)}"
    )
    sizes = {"jobs": options.jobs, "in_flight": options.in_flight}
    write_down(options.json, options.server, {**sizes, **figures})


def measured(port: int, jobs: int, in_flight: int) -> dict[str, dict[str, float]]:
    """What the client's process printed."""
    look, url = admin(port), f"redis://127.0.0.1:{port}/0"
    look.hset(f"rollout:{{{POOL}}}:desired", mapping=default_desired())
    echo = str(HERE.with_name("queue_overhead.py"))
    worker = started(echo, "--role=echo", f"--url={url}", f"--pool={POOL}", f"--in-flight={WINDOW}")
    try:
        until(lambda: b"serving" in states_of(look, POOL))
        sizes = [f"--jobs={jobs}", f"--in-flight={in_flight}"]
        client = started(str(HERE), f"--url={url}", f"--worker-pid={worker.pid}", *sizes)
        told, _ = client.communicate(timeout=600)
        return cast("dict[str, dict[str, float]]", json.loads(told))
    finally:
        worker.terminate()
        worker.wait(30)


def _told(good: bool) -> str:
    return "met" if good else "MISSED"


if __name__ == "__main__":
    main()
