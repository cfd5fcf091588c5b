"""What a worker needs of the model that a remote server serves: its directory, without the weights."""

from pathlib import Path

import msgspec

from protocols.errors import ConfigError
from worker.engines.hf_tokenizer import HFTokenizer
from worker.engines.torch_engine.checkpoint import locate, stay_offline


class LocalModel(msgspec.Struct, frozen=True):
    """From the directory."""

    tokenizer: HFTokenizer
    vocabulary: int
    context_tokens: int | None
    """What the model was made for, where its directory tells."""
    stop_ids: frozenset[int]
    """Token ids that end a response: the model's own and the tokenizer's."""


class _Config(msgspec.Struct, frozen=True):
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    eos_token_id: int | list[int] | None = None
    text_config: "_Config | None" = None


def read(model: str) -> LocalModel:
    """Read it: seconds; raises ConfigError where something is missing."""
    stay_offline()
    directory = locate(model)
    outer = _config(directory / "config.json")
    config = outer.text_config or outer
    if config.vocab_size is None:
        raise ConfigError(f"the config.json of the model {directory.name!r} has no vocab_size")
    tokenizer = HFTokenizer(directory)
    generation = _config(directory / "generation_config.json")
    ends = [_ids(one.eos_token_id) for one in (outer, config, generation)]
    return LocalModel(
        tokenizer=tokenizer,
        vocabulary=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        stop_ids=tokenizer.stop_ids.union(*ends),
    )


def _config(path: Path) -> _Config:
    if not path.is_file():
        return _Config()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Config)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"the model's {path.name} cannot be read: {error}") from None


def _ids(told: int | list[int] | None) -> list[int]:
    if told is None:
        return []
    return told if isinstance(told, list) else [told]
