"""What the queue costs beside a hand-written, unfenced echo over Redis streams (raw_pipeline.py), in one run.

    python benchmarks/queue_overhead.py [--server redis-server] [--rounds 7] [--jobs 5000] [--json]

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
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import redis

sys.path.insert(0, str(Path(__file__).parents[1]))  # raw_pipeline.py's neighbours, not installed

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

HERE = Path(__file__).parent
LEASE_S = 15.0
READY_S = 30.0
FIGURES = ("jobs_per_s", "ping_p50_ms", "producer_us", "worker_us", "redis_us")
TARGETS = {
    "queue": {"jobs_per_s": 0.5, "ping_p50_ms": 2, "producer_us": 2, "worker_us": 2, "redis_us": 4},
    "path": {"jobs_per_s": 0.25},
}


async def echo(attempt: Attempt) -> Outcome:
    """The least that a handler can do."""
    body = codec.decode_json(attempt.lease.fields[b"body"])
    return Completed(codec.encode_json(body), b"", policy_version=0, oldest_version=0)


async def echo_worker(url: str, pool: str, slots: int) -> None:
    """A worker with all its parts but the pipeline."""
    writer = Broker(Link(url, name="echo:writer"), pool)
    taker = Broker(Link(url, name="echo:taker"), pool)
    await writer.prepare()
    keeper = LeaseKeeper(url, pool, "echo", lease_s=LEASE_S, crash_limit=3)
    settler = Settler(writer, fail_limit=5, backoff_s=1, lease_s=15)
    consumer = Consumer(
        taker,
        "echo",
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
        controller=Controller("echo", steps, lambda _: {}),
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
    admin = cast("Any", redis.Redis).from_url(url)
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

        before = _own_cpu_s(), _cpu_s(worker_pid), _server_cpu_s(admin)
        start = time.perf_counter()
        await asyncio.gather(*(gated() for _ in range(options.jobs)))
        wall_s = time.perf_counter() - start
        after = _own_cpu_s(), _cpu_s(worker_pid), _server_cpu_s(admin)
    used_us = [(b - a) / options.jobs * 1e6 for a, b in zip(before, after, strict=True)]
    figures = [options.jobs / wall_s, statistics.median(pings) * 1e3, *used_us]
    print(json.dumps(dict(zip(FIGURES, (round(f, 3) for f in figures), strict=True))))


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _server_cpu_s(admin: Any) -> float:  # noqa: ANN401 - redis-py's types are loose
    info = admin.info("cpu")
    return info["used_cpu_user"] + info["used_cpu_sys"]


@contextmanager
def server(binary: str) -> Generator[int]:
    """A server on a free loopback port, nothing on disk; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        process = subprocess.Popen(
            [*command, "--appendonly", "no", "--dir", place], stdout=subprocess.DEVNULL
        )
        try:
            admin = cast("Any", redis.Redis(port=port))
            _until(admin.ping)
            yield port
        finally:
            process.terminate()
            process.wait(10)


def _until(true: Callable[[], object]) -> None:
    give_up_at = time.monotonic() + READY_S
    while True:
        try:
            if true():
                return
        except redis.RedisError:
            pass
        if time.monotonic() > give_up_at:
            raise TimeoutError("not ready")
        time.sleep(0.05)


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
    admin, pool = cast("Any", redis.Redis(port=port)), "default"
    admin.flushall()
    admin.hset(f"rollout:{{{pool}}}:desired", mapping=default_desired())
    url = f"redis://127.0.0.1:{port}/0"
    command = [sys.executable, __file__, "--role=echo", f"--url={url}", f"--pool={pool}", *sizes]
    if kind == "path":
        command = [sys.executable, "-P", "-m", "worker", "--engine=scripted", f"--url={url}"]
        command += [f"--pool={pool}", f"--slots={options.in_flight}", "--log-level=warning"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    worker = subprocess.Popen(command, env=environment)
    try:
        _until(lambda: b"serving" in _states(admin, pool))
        role = ["--role=produce", f"--url={url}", f"--pool={pool}", f"--worker-pid={worker.pid}"]
        return measured([sys.executable, __file__, *role, *sizes])
    finally:
        worker.terminate()
        worker.wait(30)


def _states(admin: Any, pool: str) -> list[bytes]:  # noqa: ANN401
    prefix = f"rollout:{{{pool}}}"
    ids = admin.zrange(f"{prefix}:workers", 0, -1)
    return [admin.hget(f"{prefix}:worker:{worker.decode()}", "state") for worker in ids]


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
    parser.add_argument("--json", action="store_true", help="all rounds as one JSON line")
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
    if options.json:
        print(json.dumps({"rounds": rounds, "ratios": ratios}))


if __name__ == "__main__":
    main()
