"""Draws the plots of docs/performance.md from the files in benchmarks/results: every round a dot, the median a bar."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance"
OWN, PEER = "#2f6f9f", "#b8b8b8"
QUEUE_COSTS = ("producer_us", "worker_us", "redis_us")


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
