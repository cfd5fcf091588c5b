"""What the doors for official clients cost beside `Client.submit`, and what a gateway holds under many streams.

    python benchmarks/gateway.py [--server redis-server] [--streams 2000] [--waves 3] [--requests 200] [--json FILE]

Latency: one request at a time, the three ways taking turns; medians, and what each adds to `submit`.
Streams: waves of concurrent streams over one gateway process; every one is compared with the text that it should
give, and the gateway's resident memory is sampled meanwhile. Server, workers and gateway are processes of their own.
"""

import argparse
import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from producer_sdk import Client
from protocols.errors import RolloutError

ROOT = Path(__file__).resolve().parents[1]
READY_S, LIMIT_S = 60.0, 150.0
ROUNDS = 5
SLOTS = 1000
"""Of a worker; there are as many workers as streams need."""
RUN = "import sys; from producer_sdk.cli import main; sys.exit(main())"
BODY = {"messages": [{"role": "user", "content": "x" * 64}], "max_tokens": 16}
TOKENS, MS_PER_TOKEN = 40, 250
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"

Ask = Callable[[], Awaitable[object]]


class Delta(msgspec.Struct):
    """What a choice adds."""

    content: str | None = None


class Choice(msgspec.Struct):
    """One choice of a chunk."""

    delta: Delta


class Chunk(msgspec.Struct):
    """One event."""

    choices: list[Choice] = []

    @property
    def texts(self) -> list[str]:
        """What is said in it."""
        return [choice.delta.content or "" for choice in self.choices]


_decode = msgspec.json.Decoder(Chunk).decode


class Wave(NamedTuple):
    """One round of concurrent streams."""

    complete: int
    took_s: float
    first_frame_p50_s: float
    rss_begin_mb: float
    rss_peak_mb: float
    rss_end_mb: float


@contextmanager
def running(log: Path, *words: str) -> Generator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def latency(client: Client, gateway: str, requests: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    over = httpx2.AsyncClient(transport=client.transport(), base_url="http://rollout")
    http = httpx2.AsyncClient(base_url=gateway, timeout=30)
    ways: dict[str, Ask] = {
        "submit": lambda: _submitted(client),
        "transport": lambda: over.post("/v1/chat/completions", json=BODY),
        "gateway": lambda: http.post("/v1/chat/completions", json=BODY),
    }
    took_ms: dict[str, list[float]] = {name: [] for name in ways}
    async with over, http:
        for ask in ways.values():
            for _ in range(20):
                await ask()
        for number in range(ROUNDS):
            for _ in range(requests // ROUNDS):
                for name, ask in ways.items():
                    took_ms[name].append(await _timed(ask))
            told = ", ".join(f"{name} {statistics.median(ms):.2f}" for name, ms in took_ms.items())
            print(f"  round {number + 1}: p50 so far, ms: {told}", flush=True)
    return {name: statistics.median(ms) for name, ms in took_ms.items()}


async def _submitted(client: Client) -> None:
    (await client.submit(BODY)).raise_for_status()


async def _timed(ask: Ask) -> float:
    began_s = time.perf_counter()
    answer = await ask()
    if isinstance(answer, httpx2.Response):
        answer.raise_for_status()
    return 1000 * (time.perf_counter() - began_s)


async def wave(port: int, pid: int, streams: int) -> Wave:
    """So many streams at once over one gateway."""
    memory: list[float] = [_rss_mb(pid)]
    sampler = asyncio.create_task(_sample(pid, memory))
    began_s = time.monotonic()
    async with asyncio.timeout(LIMIT_S):
        firsts = await asyncio.gather(*(_stream(port, number) for number in range(streams)))
    took_s = time.monotonic() - began_s
    sampler.cancel()
    whole = [first_s for first_s in firsts if first_s is not None]
    return Wave(
        len(whole),
        took_s,
        statistics.median(whole) if whole else float("nan"),
        memory[0],
        max(memory),
        _rss_mb(pid),
    )


async def _sample(pid: int, memory: list[float]) -> None:
    while True:
        memory.append(_rss_mb(pid))
        await asyncio.sleep(0.5)


def _rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def _stream(port: int, number: int) -> float | None:
    """Seconds to the first frame; None where the text is not what it should be."""
    text = f"{number:06d}".ljust(TOKENS, "x")
    script = {"text": text, "ms_per_token": MS_PER_TOKEN}
    asked = {"messages": BODY["messages"], "stream": True, "rollout": {"script": script}}
    body = json.dumps(asked).encode()
    began_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(HEAD.format(len(body)).encode() + body)
        first_s, said = 0.0, ""
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            first_s = first_s or time.monotonic() - began_s
            if line == b"data: [DONE]\n":
                return first_s if said == text else None
            said += "".join(_decode(line[6:]).texts)
        return None
    finally:
        writer.close()


def started(options: argparse.Namespace, block: ExitStack) -> tuple[str, int, int]:
    """Server, worker and gateway; the server's URL, the gateway's port and process."""
    folder = Path(block.enter_context(tempfile.TemporaryDirectory()))
    redis_port, port = free_port(), free_port()
    url = f"redis://127.0.0.1:{redis_port}/0"
    server = (options.server, "--port", str(redis_port), "--save", "", "--dir", str(folder))
    block.enter_context(running(folder / "server.log", *server))
    worker = ("worker", "--engine", "scripted", "--slots", str(SLOTS), "--url", url)
    for number in range(-(-options.streams // SLOTS)):
        log = folder / f"worker-{number}.log"
        block.enter_context(running(log, sys.executable, "-P", "-c", RUN, *worker))
    words = ("gateway", "--port", str(port), "--url", url)
    gateway = block.enter_context(
        running(folder / "gateway.log", sys.executable, "-P", "-c", RUN, *words)
    )
    give_up_at = time.monotonic() + READY_S
    while not _ready(port):
        if time.monotonic() > give_up_at:
            raise RolloutError("\n".join(log.read_text() for log in folder.glob("*.log")))
        time.sleep(0.2)
    return url, port, gateway.pid


def _ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--server", default=shutil.which("redis-server"))
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--waves", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--json", type=Path, help="a file for the figures, with machine and commit")
    options = parser.parse_args()
    with ExitStack() as block:
        url, port, pid = started(options, block)
        client = block.enter_context(Client(url))
        print(f"latency of one request at a time, {options.requests} of each", flush=True)
        p50_ms = asyncio.run(latency(client, f"http://127.0.0.1:{port}", options.requests))
        for name, ms in p50_ms.items():
            more = f"{ms - p50_ms['submit']:+.2f} ms, {ms / p50_ms['submit']:.2f} x"
            print(f"{name:10} p50 {ms:6.2f} ms   {more if name != 'submit' else ''}")
        over = p50_ms["gateway"] - p50_ms["transport"]
        print(f"gateway beside transport: {over:+.2f} ms at p50 (goal: at most +3)")
        print(f"{options.streams} concurrent streams of {TOKENS} tokens, {MS_PER_TOKEN} ms each")
        waves: list[Wave] = []
        for number in range(options.waves):
            waves.append(asyncio.run(wave(port, pid, options.streams)))
            print(f"  wave {number + 1}: {_told(waves[-1], options.streams)}", flush=True)
    if options.json:
        figures = {"streams": options.streams, "requests": options.requests, "p50_ms": p50_ms}
        told = {**figures, "waves": [one._asdict() for one in waves]}
        record.write(options.json, told, "redis", "starlette", "uvicorn")
    return 0 if all(one.complete == options.streams for one in waves) else 1


def _told(one: Wave, streams: int) -> str:
    return (
        f"{one.complete} of {streams} complete in {one.took_s:.1f} s, first frame p50 {one.first_frame_p50_s:.2f} s, "
        f"gateway RSS {one.rss_begin_mb:.0f} -> peak {one.rss_peak_mb:.0f} -> {one.rss_end_mb:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
