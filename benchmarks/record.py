"""Figures of a benchmark as a file: what was measured, on which machine, at which commit."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures with the machine and the commit beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"commit": _commit(), "machine": _machine(), **figures}
    path.write_text(json.dumps(told, indent=2) + "\n")


def _commit() -> str:
    """Of the tree as it is; `+` where there is more in it than was committed, figures aside."""
    commit = _said("git", "rev-parse", "--short=12", "HEAD")
    apart = ("--", ".", ":!benchmarks/results")
    changed = _said("git", "status", "--porcelain", "--untracked-files=no", *apart)
    return commit + "+" * bool(changed)


def _machine() -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 1),
    }


def _said(*words: str) -> str:
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
