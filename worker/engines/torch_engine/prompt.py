"""Prompts that are forwarded together, and what their samples begin from: keys and values, and the last logits."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from .kv import SlotKV
from .model import LanguageModel
from .schedule import Request, Sample


class Prompts:
    """A batch of prompts, left-aligned and padded to the longest; several fit one chunk, a longer one comes alone.

    What is computed at the padding is never read: no position sees a later one.
    """

    def __init__(self, model: LanguageModel, requests: Sequence[Request]) -> None:
        """Nothing is forwarded yet."""
        self.requests = requests
        self._model = model
        self._lengths = [len(request.prompt_ids) for request in requests]
        self._width = max(self._lengths)
        padded = [[*one.prompt_ids, *[0] * (self._width - len(one.prompt_ids))] for one in requests]
        self._token_ids = torch.tensor(padded, device=model.device)
        self._cache = DynamicCache()
        self._done = 0
        self._lines = {request: line for line, request in enumerate(requests)}
        self._logits: dict[int, Tensor] = {}

    @property
    def complete(self) -> bool:
        """Whether every prompt is forwarded."""
        return self._done == self._width

    def advance(self, chunk_tokens: int) -> int:
        """Forward the next columns, as many as `chunk_tokens` allow; returns the positions without padding."""
        start, end = self._done, min(self._width, self._done + chunk_tokens)
        ending = {
            line: length - 1 for line, length in enumerate(self._lengths) if start < length <= end
        }
        keep = sorted({last - start for last in ending.values()}) or [end - start - 1]
        logits = self._model.prefill(self._token_ids[:, start:end], start, keep, self._cache)
        for line, last in ending.items():
            self._logits[line] = logits[line, keep.index(last - start)]
        self._done = end
        return sum(max(0, min(length, end) - start) for length in self._lengths)

    def logits(self, sample: Sample) -> Tensor:
        """From which the sample's first token is drawn: float32 `[vocabulary]`."""
        return self._logits[self._lines[sample.request]]

    def copy_into(self, kv: SlotKV, row: int, sample: Sample) -> None:
        """Begin the sample's row with its prompt's keys and values."""
        kv.copy_in(row, self._cache, self._lines[sample.request], len(sample.request.prompt_ids))
