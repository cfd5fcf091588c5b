"""A program: SmolLM2 offloaded, discarded and loaded again; prints its resident memory at each station as JSON.

In a process of its own, whose memory nothing else uses.
"""

import asyncio
import sys
from pathlib import Path

import msgspec
import psutil

from tests.torch_engine_calls import say
from worker.engines.base import Weights
from worker.engines.torch_engine import Settings, TorchEngine

ROWS = 8
PROMPT = range(20, 420)


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


async def measure(weights: Path) -> dict[str, int]:
    """Loads `weights` first: those of the start are views of a file, whose pages others may share."""
    engine = TorchEngine(Settings(slots=ROWS, threads=1))
    await engine.start()
    await engine.update_weights(Weights(1, str(weights)))
    found = {"loaded": resident_bytes()}

    async def fill_rows(station: str) -> None:
        await say(engine, PROMPT, n=ROWS, max_tokens=8, min_tokens=8)
        found[station] = resident_bytes()

    await fill_rows("generated")
    await engine.offload(1)
    found["level 1"] = resident_bytes()
    await engine.offload(2)
    found["level 2"] = resident_bytes()
    await engine.onload()
    await engine.update_weights(Weights(2, str(weights)))
    found["loaded again"] = resident_bytes()
    await fill_rows("generated again")
    await engine.close()
    return found


if __name__ == "__main__":
    told = msgspec.json.encode(asyncio.run(measure(Path(sys.argv[1]))))
    sys.stdout.write(told.decode())
