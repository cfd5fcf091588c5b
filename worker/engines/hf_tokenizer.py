"""A Hugging Face tokenizer as the engine interface wants it."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from protocols.errors import ConfigError
from protocols.rollout_state import TokenIds
from worker.engines.base import NO_OPTIONS, Turn, TurnTool
from worker.engines.chat_template import ChatTemplate

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HFTokenizer:
    """Text to and from token ids, by the tokenizer in a model's directory."""

    def __init__(self, directory: Path) -> None:
        """Load it; raises ConfigError where there is none."""
        loader: Any = AutoTokenizer  # transformers' types are partial
        try:
            loaded: object = loader.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the model {directory.name!r} has no tokenizer that can be loaded: its directory must hold "
                "tokenizer.json and tokenizer_config.json"
            ) from error
        if not isinstance(loaded, PreTrainedTokenizerFast):
            raise ConfigError(
                f"the tokenizer of the model {directory.name!r} has no tokenizer.json"
            )
        self._end = cast("int | None", loaded.eos_token_id)
        self._backend: Backend = loaded.backend_tokenizer
        self._bytes = _bytes_of_tokens(self._backend)
        self.longest_token_bytes = max(map(len, self._bytes), default=1)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._chat = ChatTemplate(loaded)
        self.template, self.markup = self._chat.shows, self._chat.markup

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The token that ends a turn, where the tokenizer names one."""
        return frozenset() if self._end is None else frozenset([self._end])

    def encode(self, text: str) -> TokenIds:
        """Token ids of a text, without special tokens around it."""
        # `encode` holds the interpreter's lock for as long as it takes, a batch of one does not
        return TokenIds(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of some token ids; an incomplete character at the end is U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[TurnTool] = (),
        options: Mapping[str, bool | str] = NO_OPTIONS,
    ) -> TokenIds:
        """A conversation in the model's chat template, up to where the assistant speaks.

        Raises InvalidRequest where the template refuses the conversation or the model has none.
        """
        return self.encode(self._chat.text(turns, tools, options))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token id stands for; none for an id that the vocabulary leaves empty."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""


def _bytes_of_tokens(backend: Backend) -> list[bytes]:
    """By token id."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    spell = _byte_level if "ByteLevel" in repr(backend.decoder) else _sentence_piece
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        literal = added.get(token_id)
        found[token_id] = literal.content.encode() if literal else spell(token)
    return found


def _byte_level(token: str) -> bytes:
    """Of GPT-2's alphabet, where one character stands for one byte."""
    return b"".join(_ALPHABET.get(character, character.encode()) for character in token)


def _sentence_piece(token: str) -> bytes:
    """Of tokens that spell a space as U+2581, and a lone byte as `<0xNN>`."""
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def _alphabet() -> dict[str, bytes]:
    """GPT-2's: printable Latin-1 stands for itself, every other byte for a character from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {byte: 0x100 + i for i, byte in enumerate(others)}
    return {chr(code): bytes([byte]) for byte, code in codes.items()}


_ALPHABET = _alphabet()
