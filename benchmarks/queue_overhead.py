"""What the queue costs beside a hand-written, unfenced echo over Redis streams (raw_pipeline.py), in one run.

    python benchmarks/queue_overhead.py [--server redis-server] [--rounds 7] [--jobs 5000] [--json FILE]

Three pairs of producer and worker process take turns on one server of their own, round by round:

    raw     raw_pipeline.py, the fixed baseline
    queue   (a) client, broker and an echo handler, with fences, leases and replies
    path    (b) the whole path: OpenAI body, validation, normal form, 16 scripted tokens, response and state

Every round is printed, then medians and their ratios to the baseline. 2 KB bodies, 256 in flight.
"""

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import redis

sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages of this tree, not installed

from benchmarks.machine import HERE, admin, cpu_s, server, server_cpu_s, until, write_down
from producer_sdk import Client
from protocols import codec
from protocols.control import default_desired
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from worker.consumer import Consumer
from worker.controller import Controller
from worker.engines.scripted import ScriptedEngine
from worker.lease import LeaseKeeper
from worker.outcome import Completed, Outcome, Settler
from worker.pipeline import Attempt
from worker.steps import Steps

LEASE_S = 15.0
FIGURES = ("jobs_per_s", "ping_p50_ms", "producer_us", "worker_us", "redis_us")
TARGETS = {
    "queue": {"jobs_per_s": 0.5, "ping_p50_ms": 2, "producer_us": 2, "worker_us": 2, "redis_us": 4},
    "path": {"jobs_per_s": 0.25},
}


async def echo(attempt: Attempt) -> Outcome:
    """The least that a handler can do."""
    body = codec.decode_json(attempt.lease.fields[b"body"])
    return Completed(codec.encode_json(body), b"", policy_version=0, oldest_version=0)


async def echo_worker(url: str, pool: str, slots: int, name: str = "echo") -> None:
    """A worker with all its parts but the pipeline."""
    writer = Broker(Link(url, name=f"{name}:writer"), pool)
    taker = Broker(Link(url, name=f"{name}:taker"), pool)
    await writer.prepare()
    keeper = LeaseKeeper(url, pool, name, lease_s=LEASE_S, crash_limit=3)
    settler = Settler(writer, fail_limit=5, backoff_s=1, lease_s=15)
    consumer = Consumer(
        taker,
        name,
        keeper,
        settler,
        echo,
        slots=slots,
        lease_s=LEASE_S,
        policy_version=lambda: 0,
    )
    steps = Steps(consumer, ScriptedEngine(), print)
    steps.life = "serving"
    keeper.start(
        facts=lambda: {"state": steps.state()},
        controller=Controller(name, steps, lambda _: {}),
        obey=consumer.obey,
        broken=print,
    )
    await consumer.run()


def payload_of(size: int) -> dict[str, object]:
    """As raw_pipeline.py's."""
    content = "x" * (size - 80)
    messages = [{"role": "user", "content": content}]
    return {"model": "default", "max_tokens": 16, "messages": messages}


async def produce(url: str, pool: str, worker_pid: int, options: argparse.Namespace) -> None:
    """Ping, then run the jobs; prints one JSON line like raw_pipeline.py's."""
    look = cast("Any", redis.Redis).from_url(url)
    payload = payload_of(options.size)
    async with Client(url, pool=pool) as client:

        async def one() -> None:
            reply = await client.submit(payload, protocol="openai.chat")
            if not reply.raise_for_status().response:
                raise RuntimeError("an empty response")

        for _ in range(50):
            await one()
        pings: list[float] = []
        for _ in range(options.pings):
            start = time.perf_counter()
            await one()
            pings.append(time.perf_counter() - start)
        gate = asyncio.Semaphore(options.in_flight)

        async def gated() -> None:
            async with gate:
                await one()

        before = _own_cpu_s(), cpu_s(worker_pid), server_cpu_s(look)
        start = time.perf_counter()
        await asyncio.gather(*(gated() for _ in range(options.jobs)))
        wall_s = time.perf_counter() - start
        after = _own_cpu_s(), cpu_s(worker_pid), server_cpu_s(look)
    used_us = [(b - a) / options.jobs * 1e6 for a, b in zip(before, after, strict=True)]
    figures = [options.jobs / wall_s, statistics.median(pings) * 1e3, *used_us]
    print(json.dumps(dict(zip(FIGURES, (round(f, 3) for f in figures), strict=True))))


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measured(command: list[str]) -> dict[str, float]:
    """The JSON line that a command prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    return json.loads(done.stdout.strip().splitlines()[-1])


def round_of(kind: str, port: int, options: argparse.Namespace) -> dict[str, float]:
    """One producer and one worker process of that kind."""
    sizes = [f"--jobs={options.jobs}", f"--in-flight={options.in_flight}"]
    sizes += [f"--size={options.size}", f"--pings={options.pings}"]
    if kind == "raw":
        return measured([sys.executable, str(options.baseline), f"--port={port}", *sizes])
    look, pool = admin(port), "default"
    look.flushall()
    look.hset(f"rollout:{{{pool}}}:desired", mapping=default_desired())
    url = f"redis://127.0.0.1:{port}/0"
    command = [sys.executable, __file__, "--role=echo", f"--url={url}", f"--pool={pool}", *sizes]
    if kind == "path":
        command = [sys.executable, "-P", "-m", "worker", "--engine=scripted", f"--url={url}"]
        command += [f"--pool={pool}", f"--slots={options.in_flight}", "--log-level=warning"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    worker = subprocess.Popen(command, env=environment)
    try:
        until(lambda: b"serving" in states_of(look, pool))
        role = ["--role=produce", f"--url={url}", f"--pool={pool}", f"--worker-pid={worker.pid}"]
        return measured([sys.executable, __file__, *role, *sizes])
    finally:
        worker.terminate()
        worker.wait(30)


def states_of(look: Any, pool: str) -> list[bytes]:  # noqa: ANN401 - redis-py's types are loose
    """What the workers of a pool say that they are."""
    prefix = f"rollout:{{{pool}}}"
    ids = look.zrange(f"{prefix}:workers", 0, -1)
    return [look.hget(f"{prefix}:worker:{worker.decode()}", "state") for worker in ids]


def report(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Print medians and ratios; returns the ratios."""
    medians = {
        kind: {figure: statistics.median(row[figure] for row in rows) for figure in FIGURES}
        for kind, rows in rounds.items()
    }
    ratios: dict[str, dict[str, float]] = {}
    print(f"{'median':8}", *(f"{figure:>13}" for figure in FIGURES))
    for kind, row in medians.items():
        print(f"{kind:8}", *(f"{row[figure]:13.2f}" for figure in FIGURES))
    for kind, targets in TARGETS.items():
        ratios[kind] = {f: medians[kind][f] / medians["raw"][f] for f in FIGURES}
        print(f"{kind + '/raw':8}", *(f"{ratios[kind][figure]:13.2f}" for figure in FIGURES))
        for figure, target in targets.items():
            good = ratios[kind][figure] >= target if target < 1 else ratios[kind][figure] <= target
            sign = ">=" if target < 1 else "<="
            told = "met" if good else "MISSED"
            print(f"  {kind} {figure}: {ratios[kind][figure]:.2f} {sign} {target}: {told}")
    return ratios


def main() -> None:
    """Run the rounds, or one of the roles in them."""
    parser = argparse.ArgumentParser(description="The queue beside raw_pipeline.py.")
    parser.add_argument("--server", default=shutil.which("redis-server"), help="its binary")
    parser.add_argument("--baseline", type=Path, default=HERE / "raw_pipeline.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--pings", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    for hidden in ("--role", "--url", "--pool"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--worker-pid", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "echo":
        asyncio.run(echo_worker(options.url, options.pool, options.in_flight))
    elif options.role == "produce":
        asyncio.run(produce(options.url, options.pool, options.worker_pid, options))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Take turns; print every round."""
    if not options.server:
        sys.exit("no redis-server on the PATH: name one with --server")
    rounds: dict[str, list[dict[str, float]]] = {"raw": [], "queue": [], "path": []}
    print(f"redis-py {redis.__version__}, {options.server}, {options.jobs} jobs a round")
    with server(options.server) as port:
        for number in range(1, options.rounds + 1):
            for kind, rows in rounds.items():
                rows.append(round_of(kind, port, options))
                print(f"round {number} {kind:6}", json.dumps(rows[-1]), flush=True)
    ratios = report(rounds)
    sizes = {name: getattr(options, name) for name in ("jobs", "in_flight", "size", "pings")}
    write_down(options.json, options.server, {**sizes, "rounds": rounds, "ratios": ratios})


if __name__ == "__main__":
    main()
