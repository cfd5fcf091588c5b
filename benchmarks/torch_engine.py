"""The torch engine beside transformers' own ways to generate: SmolLM2, float32, one thread, CPU seconds of the process.

`python benchmarks/torch_engine.py` prints every round, the medians and their ratios. All ways sample at temperature 1
and give each token's log-probability. All share one process and take turns; the engine is used through `generate` and
keeps no prefixes here, because its peers keep none.

mixed    32 requests at once, of 8, 16, 32 or 64 tokens: tokens a CPU second.
         own, static (`generate` on one padded batch), continuous (transformers' own), single (one by one, a few).
arrivals requests that arrive by a Poisson process. Its clock is the process's CPU time, and skips the time without
         work, so that what else the machine does is not measured. Goodput: tokens of the requests that were answered
         in time, a second; in time is two seconds and a quarter of a second a token. own, and static: whoever waits
         when a batch has ended is in the next one.
counters positions that a group of 8 on 512 tokens forwards, and a second turn, with prefixes kept.

`--json FILE` keeps the rounds; where FILE has some of the same commit and machine, the new ones are added, so that a
run may come in pieces.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any, cast

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import msgspec
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from protocols.rollout_state import SampleParams, TokenIds
from worker.engines.base import Call, Engine, Turn
from worker.engines.torch_engine import Settings, TorchEngine
from worker.engines.torch_engine.checkpoint import locate

TOPICS = (
    "rain rivers moons bread cats trains mountains coffee music chess bees glass paper ships stars salt "
    "wind gold maps clocks tea rice oaks bridges snow whales sand ink wool bicycles lamps kites"
)
LENGTHS = (8, 16, 32, 64)
SLOTS = 32
SINGLES = 4
RATE = 1.5
"""Arrivals a CPU second: about two thirds of what the engine can do."""
ARRIVALS = 16
FIRST_S, TOKEN_S = 2.0, 0.25
PACKAGES = ("torch", "transformers")
TARGETS = {"static": 1.1, "continuous": 1.1, "single": 4.0, "arrivals": 1.5}

Rounds = list[dict[str, float]]


class Asked(msgspec.Struct, frozen=True):
    """One request."""

    prompt_ids: list[int]
    tokens: int
    seed: int
    at_s: float = 0.0

    @property
    def limit_s(self) -> float:
        """In time is what is answered within it."""
        return FIRST_S + TOKEN_S * self.tokens


class Clock:
    """CPU seconds of this process, and what was skipped."""

    def __init__(self) -> None:
        """Zero is now."""
        self._skipped_s = -time.process_time()

    def now_s(self) -> float:
        """Seconds."""
        return time.process_time() + self._skipped_s

    def skip_to(self, at_s: float) -> None:
        """Go on at `at_s`."""
        self._skipped_s += max(0.0, at_s - self.now_s())


def requests(engine: Engine, number: int) -> list[Asked]:
    """Of the round `number`."""
    return [
        Asked(
            list(engine.tokenizer.render([Turn(role="user", content=text)])),
            LENGTHS[i % len(LENGTHS)],
            1000 * number + i,
        )
        for i, topic in enumerate(TOPICS.split())
        for text in [f"Write a short note about {topic}." + " Keep it plain and warm." * (i % 3)]
    ]


def arriving(engine: Engine, number: int) -> list[Asked]:
    """The first of them, spread over time and in another order."""
    chance, at_s, spread = Random(number), 0.0, list[Asked]()
    for one in chance.sample(requests(engine, number), ARRIVALS):
        at_s += chance.expovariate(RATE)
        spread.append(msgspec.structs.replace(one, at_s=at_s))
    return spread


async def answer(engine: Engine, asked: Asked) -> None:
    """By the engine."""
    length = asked.tokens
    params = SampleParams(max_tokens=length, min_tokens=length, sampling_seed=asked.seed)
    tokens = logprobs = 0
    async for segment in engine.generate(Call(TokenIds(asked.prompt_ids), params)):
        tokens += len(segment.token_ids)
        logprobs += len(segment.logprobs)
    check(asked, tokens, logprobs)


def check(asked: Asked, tokens: int, logprobs: int) -> None:
    """A way that gives less than it was asked for is not measured."""
    if (tokens, logprobs) != (asked.tokens, asked.tokens):
        raise RuntimeError(f"{tokens} tokens and {logprobs} log-probabilities of {asked.tokens}")


class Transformers:
    """The peers."""

    def __init__(self) -> None:
        """The same weights."""
        loader = cast("Any", AutoModelForCausalLM)  # transformers' types are partial
        self._model = loader.from_pretrained(locate("smollm2"), dtype=torch.float32).eval()
        # no end token: each request has its length. `generate` takes the model's own where it is given none
        self._model.generation_config.eos_token_id = None
        self._sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def static(self, batch: list[Asked]) -> None:
        """`generate` on one padded batch, as long as the longest of it."""
        width = max(len(one.prompt_ids) for one in batch)
        padding = [width - len(one.prompt_ids) for one in batch]
        ids = [[2] * pad + one.prompt_ids for pad, one in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        length = max(one.tokens for one in batch)
        config = GenerationConfig(max_new_tokens=length, pad_token_id=2, **self._sampling)
        told = self._model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            generation_config=config,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = told.sequences[:, width:]
        logprobs = [
            _logprobs(step, tokens[:, at])
            for at, step in enumerate(cast("list[Tensor]", told.logits))
        ]
        for row, one in enumerate(batch):
            check(one, len(tokens[row, : one.tokens]), len(logprobs[: one.tokens]))

    def single(self, some: list[Asked]) -> None:
        """One by one."""
        for one in some:
            self.static([one])

    def continuous(self, some: list[Asked]) -> float:
        """Its continuous batching; returns CPU seconds from the first request on."""
        config = GenerationConfig(
            max_new_tokens=max(LENGTHS), eos_token_id=-1, pad_token_id=2, **self._sampling
        )
        # sizes and kernel as it needs them on a CPU: it finds neither itself
        manager = self._model.init_continuous_batching(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=128,
                page_size=64,
                max_batch_tokens=512,
                return_logprobs=True,
                auto_switch_to_flash=False,
                allow_block_sharing=False,
            ),
        )
        manager.start()
        try:
            self._collect(manager, [msgspec.structs.replace(some[0], tokens=2)])
            start_s = time.process_time()
            self._collect(manager, some)
            return time.process_time() - start_s
        finally:
            manager.stop(block=True, timeout=60)

    def _collect(self, manager: Any, some: list[Asked]) -> None:  # noqa: ANN401
        wanted = {
            manager.add_request(one.prompt_ids, max_new_tokens=one.tokens, eos_token_id=-1): one
            for one in some
        }
        while wanted:
            told = manager.get_result(timeout=1)
            if told is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching has ended")
            elif told.error:
                raise RuntimeError(told.error)
            elif told.is_finished():
                asked = wanted.pop(told.request_id)
                check(asked, len(told.generated_tokens), len(told.logprobs))


def _logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """Of one step's tokens."""
    chosen = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return cast("list[float]", cast("Any", chosen).tolist())


async def mixed(engine: Engine, peers: Transformers, number: int) -> dict[str, float]:
    """Tokens a CPU second, all requests at once."""
    some = requests(engine, number)
    tokens, few = sum(one.tokens for one in some), some[:SINGLES]
    start_s = time.process_time()
    await asyncio.gather(*(answer(engine, one) for one in some))
    own_s = time.process_time()
    peers.static(some)
    static_s = time.process_time()
    peers.single(few)
    single_s = time.process_time()
    return {
        "own": tokens / (own_s - start_s),
        "static": tokens / (static_s - own_s),
        "single": sum(one.tokens for one in few) / (single_s - static_s),
        "continuous": tokens / peers.continuous(some),
    }


async def arrivals(engine: Engine, peers: Transformers, number: int) -> dict[str, float]:
    """Goodput and the median latency, while requests arrive."""
    some = arriving(engine, number)
    figures: dict[str, float] = {}
    for name, took_s, ended_s in (
        ("own", *await _own_arrivals(engine, some)),
        ("static", *_static_arrivals(peers, some)),
    ):
        in_time = [
            one.tokens for one, took in zip(some, took_s, strict=True) if took <= one.limit_s
        ]
        figures[f"{name} goodput"] = sum(in_time) / ended_s
        figures[f"{name} in time"] = len(in_time)
        figures[f"{name} p50 s"] = statistics.median(took_s)
    return figures


async def _own_arrivals(engine: Engine, some: list[Asked]) -> tuple[list[float], float]:
    """The latency of each request, and when the last was answered."""
    clock = Clock()

    async def one(asked: Asked) -> float:
        await answer(engine, asked)
        return clock.now_s() - asked.at_s

    tasks: list[asyncio.Task[float]] = []
    for asked in some:
        while clock.now_s() < asked.at_s:
            if all(task.done() for task in tasks):
                clock.skip_to(asked.at_s)
            else:
                await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(one(asked)))
    return await asyncio.gather(*tasks), clock.now_s()


def _static_arrivals(peers: Transformers, some: list[Asked]) -> tuple[list[float], float]:
    clock, took_s = Clock(), list[float]()
    while len(took_s) < len(some):
        clock.skip_to(some[len(took_s)].at_s)
        due = [one for one in some[len(took_s) :] if one.at_s <= clock.now_s()]
        peers.static(due)
        took_s += [clock.now_s() - one.at_s for one in due]
    return took_s, clock.now_s()


async def counters() -> dict[str, int]:
    """What goes through the model, by the engine's own count; a sample's last token does not."""
    engine = TorchEngine(Settings(threads=1))
    await engine.start()
    chance = Random(1)
    prompt = [chance.randrange(20, engine.vocabulary) for _ in range(512)]
    new = [chance.randrange(20, engine.vocabulary) for _ in range(40)]

    async def forwarded(prompt_ids: list[int], n: int) -> tuple[int, list[int]]:
        before, first = engine.counters()["forwarded_tokens"], list[int]()
        params = SampleParams(n=n, max_tokens=16, min_tokens=16, sampling_seed=1)
        async for segment in engine.generate(Call(TokenIds(prompt_ids), params)):
            if segment.index == 0:
                first += segment.token_ids
        return engine.counters()["forwarded_tokens"] - before - n * 15, first

    group, said = await forwarded(prompt, 8)
    turn, _ = await forwarded([*prompt, *said, *new], 1)
    await engine.close()
    # of the first turn's answer the last token was drawn, and not forwarded
    return {"group of 8 on 512": group, "second turn, 40 new": turn}


def warm_start() -> dict[str, float]:
    """Of a process, until it has an engine that could generate; the model is converted already."""
    program = (
        "import asyncio, os; from worker.engines.torch_engine import TorchEngine; "
        "asyncio.run(TorchEngine().start()); os._exit(0)"
    )
    before, start_s = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    after = os.times()
    used_s = after.children_user + after.children_system
    used_s -= before.children_user + before.children_system
    return {"warm start s": time.perf_counter() - start_s, "warm start CPU s": used_s}


def report(rounds: Rounds) -> dict[str, float]:
    """Print medians and ratios; returns the ratios."""
    medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    print("median", _shown(medians))
    goodput = medians["static goodput"]
    ratios = {name: medians["own"] / medians[name] for name in ("static", "continuous", "single")}
    ratios["arrivals"] = medians["own goodput"] / goodput if goodput else float("inf")
    for name, target in TARGETS.items():
        told = "met" if ratios[name] >= target else "MISSED"
        print(f"  own / {name}: {ratios[name]:.2f} >= {target}: {told}")
    return ratios


def _shown(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in figures.items())


async def measure(number: int) -> dict[str, float]:
    """One round."""
    engine = TorchEngine(Settings(slots=SLOTS, threads=1, prefix_caching=False))
    await engine.start()
    peers = Transformers()
    await answer(engine, requests(engine, 0)[0])
    peers.single([requests(engine, 0)[0]])
    figures = await mixed(engine, peers, number) | await arrivals(engine, peers, number)
    await engine.close()
    return figures


def former_rounds(path: Path | None) -> Rounds:
    """Those of the same commit, machine and packages that a file has."""
    if path is None or not path.exists():
        return []
    former = json.loads(path.read_text())
    same = former["circumstances"] == record.circumstances(*PACKAGES)
    return former["rounds"] if same else []


def main() -> None:
    """Run the rounds, then print what they come to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="further ones, 5 unless told")
    parser.add_argument("--json", type=Path, help="the file that keeps them")
    options = parser.parse_args()
    rounds = former_rounds(options.json)
    for _ in range(options.rounds):
        rounds.append(asyncio.run(measure(len(rounds) + 1)))
        print(f"round {len(rounds)}", _shown(rounds[-1]), flush=True)
    counted, start = asyncio.run(counters()), warm_start()
    print(json.dumps(counted), _shown(start))
    figures = {"rounds": rounds, "ratios": report(rounds), "counters": counted, "start": start}
    if options.json:
        record.write(options.json, figures, *PACKAGES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
