"""Figures of a benchmark as a file: what was measured, on which machine, of which commit."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write(path: Path, figures: dict[str, Any], *packages: str) -> None:
    """Write the figures, with time, load, machine, commit and the versions of these packages beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_1min": round(os.getloadavg()[0], 1),
        "circumstances": circumstances(*packages),
        **figures,
    }
    path.write_text(json.dumps(told, indent=1) + "\n")


def circumstances(*packages: str) -> dict[str, str | int]:
    """Where and of what a run is: what is the same for runs that may be compared round by round."""
    return {
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _commit() -> str:
    """Of the tree as it is; `+` where there is more in it than was committed, results left out."""
    commit = _said("git", "rev-parse", "--short=12", "HEAD")
    results = RESULTS.relative_to(ROOT)
    changed = _said(
        "git", "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{results}"
    )
    return commit + "+" * bool(changed)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _said(*words: str) -> str:
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
