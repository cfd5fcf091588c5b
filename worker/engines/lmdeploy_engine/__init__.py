"""lmdeploy's `AsyncEngine` in this process, as one engine of one worker: the engine for production.

`engine` is the worker's side; `drawing` sees each sample through one of lmdeploy's sessions; `request` turns a call
into lmdeploy's parameters; `weights` reads new weights; `pipeline` alone touches lmdeploy, by the names in `surface`.
Some of these are its insides: exactly version 0.18.0 is taken.

Limits, beside those of the hardware:

- `presence_penalty` and `frequency_penalty` are refused, and a temperature above 2: lmdeploy has none.
- Of a seed lmdeploy uses the low 32 bits. What is drawn depends on (seed, position), as everywhere, but also on
  rounding, which other samples in the batch may change: a resumed sample keeps its tokens and log-probabilities, and
  what follows may differ from an undisturbed run.
- A group's first sample forwards the prompt; the others begin when its first token is there, and forward what the
  prefix cache, which has whole blocks of 64 tokens, lacks of it. Without the cache each forwards all of it.
- `forwarded_tokens` counts what is known from outside: positions submitted and not found in the prefix cache, and
  tokens drawn; not what lmdeploy forwards again when it runs out of cache blocks.
- Guides take the place of lmdeploy's own manager of grammars, in this process: on one GPU, on the PyTorch backend.
- Weights are replaced on one GPU only (`--tp 1`), on the PyTorch backend. What the files tell is checked before
  anything is touched; should lmdeploy fail while it copies them, the old ones are lost, and the worker leaves. An
  update of loaded weights moves these to host memory first, which holds both for a while.
- Loading the model holds the event loop up, so a worker that starts says that it is stuck.
- `return_routed_experts` wants a mixture of experts on the PyTorch backend, and `--routed-experts`. The experts come
  with a sample's end, so `stops` beside it is refused: lmdeploy does not know when a text ends. A sample that goes on
  after kept tokens has those of the weights that forwarded them again.
- TurboMind (`--backend turbomind`) is passed through and needs a GPU to be tried. Its weights cannot be moved or
  replaced, `repetition_penalty`, `logit_bias` and guides are refused, since it calls no processors of logits, and it is
  not known to give log-probabilities before temperature, top-k and top-p: where these matter, use the PyTorch backend,
  which does.

lmdeploy keeps its prefix cache over sleep and new weights, and would answer from the old ones' keys and values: every
move of the weights empties it here.
"""

import importlib.metadata

from protocols.errors import ConfigError
from worker.config import Config

from .engine import LMDeployEngine
from .settings import Settings

__all__ = ["VERSION", "LMDeployEngine", "Settings", "build"]

VERSION = "0.18.0"


def build(config: Config) -> LMDeployEngine:
    """The engine that a worker's configuration asks for, not started; raises ConfigError without the right lmdeploy."""
    _check_version()
    return LMDeployEngine(
        Settings(
            model=config.model,
            served_name=config.served_model,
            backend=config.backend,
            dtype="bfloat16" if config.dtype == "bfloat16" else "auto",
            slots=config.slots,
            tp=config.tp,
            ep=config.ep,
            context_tokens=config.context_tokens,
            cache_ratio=config.cache_ratio,
            prefix_caching=config.prefix_caching,
            routed_experts=config.routed_experts,
            policy_version=config.policy_version,
        )
    )


def _check_version() -> None:
    try:
        found = importlib.metadata.version("lmdeploy")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        raise ConfigError(
            f"the engine `lmdeploy` needs lmdeploy {VERSION} exactly, and {found or 'none'} is installed; run "
            "`pip install 'rolloutq[lmdeploy]'` in an environment of its own, or choose another engine"
        )
