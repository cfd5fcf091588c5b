"""Makes plots and table of docs/performance.md from the files in benchmarks/results.

In the plots every round is a dot and the median a bar.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- made by benchmarks/page.py -->", "<!-- end -->"
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance"
OWN, PEER = "#2f6f9f", "#b8b8b8"
QUEUE_COSTS = ("producer_us", "worker_us", "redis_us")
QUEUE_AIMS = {
    "queue": {
        "jobs_per_s": ("jobs a second", "≥ 0.5"),
        "ping_p50_ms": ("one job at a time, p50", "≤ 2"),
        "producer_us": ("CPU of the producer", "≤ 2"),
        "worker_us": ("CPU of the worker", "≤ 2"),
        "redis_us": ("CPU of the server", "≤ 4"),
    },
    "path": {"jobs_per_s": ("jobs a second of the whole path", "≥ 0.25")},
}
TORCH_AIMS = {
    "static": ("32 mixed requests, beside static batching", "≥ 1.1"),
    "continuous": ("beside transformers' continuous batching", "≥ 1.1"),
    "single": ("beside one by one", "≥ 4"),
    "arrivals": ("goodput of Poisson arrivals, beside static batching", "≥ 1.5"),
}


def main() -> None:
    """Draw them all."""
    mpl.rcParams |= {
        "svg.hashsalt": "rolloutq",  # the same figures are the same file
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    PLOTS.mkdir(exist_ok=True)
    queue()
    torch_engine()
    batch()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    target: str
    file: str


def table() -> str:
    """What was aimed at and what was found, in Markdown."""
    rows = [*queue_rows(), *memory_rows(), *idle_rows(), *torch_rows(), *gateway_rows()]
    lines = ["| what | found | aim | of |", "| --- | --- | --- | --- |"]
    for what, found, target, file in [*rows, *batch_rows()]:
        commit = _read(file)["circumstances"]["commit"]
        source = f"[{file}.json](../benchmarks/results/{file}.json), {commit}"
        lines.append(f"| {what} | {found} | {target} | {source} |")
    return "\n".join(lines)


def queue_rows() -> Iterator[Row]:
    """Beside the bare pipeline, on both servers."""
    for file in ("queue_redis7", "queue_valkey"):
        found = _read(file)
        name = " ".join(found["server"].split()[::2]).replace("v=", "")
        for way, aims in QUEUE_AIMS.items():
            for figure, (what, target) in aims.items():
                ratio = f"{found['ratios'][way][figure]:.3f}"
                yield Row(f"{name}: {what}, beside the pipeline", ratio, target, file)


def memory_rows() -> Iterator[Row]:
    """After many jobs, and with many in flight."""
    file = "queue_memory_redis7"
    found = _read(file)
    for who in ("client", "worker"):
        early, late = (found[when][f"{who}_mb"] for when in ("early", "late"))
        what = f"memory of a {who} after 100,000 jobs, beside that after 10,000"
        yield Row(what, f"{late / early:.2f}", "≤ 1.1", file)
    times = found["times"]
    ratio = times["p99_s"] / times["in_flight_s"]
    yield Row("10,000 in flight: p99, beside in flight ÷ throughput", f"{ratio:.2f}", "≤ 2", file)


def idle_rows() -> Iterator[Row]:
    """Without jobs."""
    file = "idle_redis7"
    found = _read(file)
    for who, cores in found["busy"].items():
        yield Row(f"an idle {who}, of a core", f"{cores:.2%}", "< 1 %", file)
    for way, commands in found["commands"].items():
        what = f"commands because of one job by {way}, with 200 idle workers"
        yield Row(what, str(sum(commands.values())), "≤ 10", file)


def torch_rows() -> Iterator[Row]:
    """Beside transformers."""
    file = "torch_engine"
    found = _read(file)
    for name, (what, target) in TORCH_AIMS.items():
        yield Row(f"torch engine: {what}", f"{found['ratios'][name]:.2f}", target, file)
    counted = found["counters"]
    group, turn = (str(counted[name]) for name in ("group of 8 on 512", "second turn, 40 new"))
    yield Row(
        "torch engine: positions that a group of 8 on 512 tokens forwards", group, "512", file
    )
    yield Row("torch engine: the same of a second turn with 40 new tokens", turn, "≤ 41", file)
    wall_s, cpu_s = (found["start"][f"warm start {what}s"] for what in ("", "CPU "))
    told = f"{wall_s:.1f}; {cpu_s:.1f}"
    yield Row("torch engine: warm start, seconds; of CPU", told, "≤ 5", file)


def gateway_rows() -> Iterator[Row]:
    """HTTP beside the transport."""
    file = "gateway"
    found = _read(file)
    p50_ms, waves = found["p50_ms"], found["waves"]
    more_ms = p50_ms["gateway"] - p50_ms["transport"]
    yield Row(
        "one request over the gateway, more than over the transport, p50",
        f"{more_ms:.1f} ms",
        "≤ 3 ms",
        file,
    )
    complete = " ".join(f"{wave['complete']:,}" for wave in waves)
    yield Row(
        f"streams complete of {found['streams']:,} at once, wave by wave", complete, "all", file
    )
    peaks = " ".join(f"{wave['rss_peak_mb']:.0f}" for wave in waves)
    yield Row("memory of the gateway in these waves, MB", peaks, "flat", file)


def batch_rows() -> Iterator[Row]:
    """A file of requests."""
    file = "batch"
    rounds = _read(file)["rounds"]
    speed = {way: statistics.median(one["rows_per_s"] for one in rounds[way]) for way in rounds}
    for peer, what, target in (
        ("map", "Client.map", "≥ 0.8"),
        ("gather", "asyncio.gather over the gateway", ""),
    ):
        ratio = f"{speed['batch'] / speed[peer]:.2f}"
        yield Row(f"rows a second of `batch run`, beside {what}", ratio, target, file)


def queue() -> None:
    """Jobs a second, and what a job costs, beside the bare pipeline."""
    figure, places = pyplot.subplots(2, 2, figsize=(8, 5.4), width_ratios=(1, 1.6))
    for (speed, costs), name in zip(places, ("queue_redis7", "queue_valkey"), strict=True):
        found = _read(name)
        rounds: dict[str, list[dict[str, float]]] = found["rounds"]
        bars(
            speed,
            {way: [one["jobs_per_s"] for one in rounds[way]] for way in ("raw", "queue", "path")},
        )
        speed.set_title(f"jobs a second, {found['server']}", fontsize=9)
        told = {
            f"{cost.removesuffix('_us')}\n{way}": [one[cost] for one in rounds[way]]
            for cost in QUEUE_COSTS
            for way in ("raw", "queue")
        }
        bars(costs, told)
        costs.set_title("CPU microseconds a job", fontsize=9)
    _save(figure, "queue")


def torch_engine() -> None:
    """Tokens a CPU second beside transformers' own ways."""
    rounds: list[dict[str, float]] = _read("torch_engine")["rounds"]
    figure, (mixed, arrivals) = pyplot.subplots(1, 2, figsize=(8, 3), width_ratios=(2, 1))
    ways = {"own": "own", "continuous": "continuous", "static": "static", "single": "one by one"}
    bars(mixed, {told: [one[way] for one in rounds] for way, told in ways.items()})
    mixed.set_title("32 mixed requests at once: tokens a CPU second", fontsize=9)
    goodput = {way: [one[f"{way} goodput"] for one in rounds] for way in ("own", "static")}
    bars(arrivals, goodput)
    arrivals.set_title("Poisson arrivals: tokens in time", fontsize=9)
    _save(figure, "torch_engine")


def batch() -> None:
    """Rows a second and memory beside the same requests over HTTP."""
    rounds: dict[str, list[dict[str, float]]] = _read("batch")["rounds"]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(8, 3))
    ways = {"batch": "batch run", "map": "Client.map", "gather": "gather over\nthe gateway"}
    bars(speed, {told: [one["rows_per_s"] for one in rounds[way]] for way, told in ways.items()})
    speed.set_title("rows a second", fontsize=9)
    bars(memory, {told: [one["peak_mb"] for one in rounds[way]] for way, told in ways.items()})
    memory.set_title("most memory of the sender, MB", fontsize=9)
    _save(figure, "batch")


def bars(place: Any, groups: Mapping[str, Sequence[float]]) -> None:  # noqa: ANN401 - half typed there
    """A bar for the median of each group, and a dot for every round; what is ours is blue."""
    for at, (name, rounds) in enumerate(groups.items()):
        ours = not any(peer in name for peer in ("raw", "static", "continuous", "one by", "gather"))
        median = statistics.median(rounds)
        place.bar(at, median, color=OWN if ours else PEER, width=0.6)
        place.plot([at] * len(rounds), rounds, "o", color="black", markersize=2.5, alpha=0.6)
        place.annotate(
            f"{median:,.0f}", (at, max(rounds)), (0, 4), textcoords="offset points", ha="center"
        )
    place.set_xticks(range(len(groups)), list(groups))
    place.margins(y=0.15)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _save(figure: Any, name: str) -> None:  # noqa: ANN401 - matplotlib's own
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
