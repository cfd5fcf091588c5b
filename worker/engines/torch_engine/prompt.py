"""Prompts that are forwarded together, and what their samples begin from: keys and values, and the last logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kv import SlotKV
from .model import LanguageModel
from .prefix_kv import PrefixKV
from .schedule import Request, Sample


class Prompts:
    """A batch of prompts in rows of their own: several fit one chunk, a longer one comes alone, chunk by chunk.

    What is kept of a prompt's beginning is not forwarded again. What is left of shorter ones is padded at its front;
    the padding lies behind all tokens, where none of them sees it.
    """

    def __init__(
        self, model: LanguageModel, like: SlotKV, prefixes: PrefixKV, requests: Sequence[Request]
    ) -> None:
        """Nothing is forwarded yet."""
        self.requests = requests
        self._model = model
        self._prefixes = prefixes
        self._rows = {request: row for row, request in enumerate(requests)}
        self._behind = max(len(request.prompt_ids) for request in requests)
        """A position behind all tokens, where padding goes."""
        tokens = self._behind + (len(requests) > 1)
        self._kv = like.fresh(len(requests), len(requests) * tokens)
        self._kv.reserve(len(requests), tokens, tokens)
        # the last token is forwarded all the same: its logits are not kept
        starts = [
            prefixes.copy_out(request.prompt_ids[:-1], self._kv, row)
            for request, row in self._rows.items()
        ]
        self._token_ids, self._positions = self._front_padded(starts)
        self._done = 0
        self._logits: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether every prompt is forwarded."""
        return self._logits is not None

    def advance(self, chunk_tokens: int) -> int:
        """Forward the next columns, as many as `chunk_tokens` allow; returns the positions without padding."""
        columns = slice(self._done, self._done + chunk_tokens)
        positions = self._positions[:, columns]
        logits = self._model.decode(
            self._token_ids[:, columns], positions, int(positions.max()) + 1, self._kv
        )
        self._done += positions.shape[1]
        if self._done == self._positions.shape[1]:
            self._logits = logits
            self._keep(logits)
        return int((positions < self._behind).sum())

    def logits(self, sample: Sample) -> Tensor:
        """From which the sample's first token is drawn: float32 `[vocabulary]`; the prompts are complete."""
        if self._logits is None:
            raise RuntimeError("the prompt is not forwarded yet")
        return self._logits[self._rows[sample.request]]

    def copy_into(self, kv: SlotKV, row: int, sample: Sample) -> None:
        """Begin the sample's row with its prompt's keys and values."""
        kv.copy_in(row, self._kv, self._rows[sample.request], len(sample.request.prompt_ids))

    def _front_padded(self, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and positions of what is left behind `starts`: `[rows, width]` each."""
        ids = [
            request.prompt_ids[start:] for request, start in zip(self.requests, starts, strict=True)
        ]
        width = max(map(len, ids))
        device = self._model.device
        return (
            torch.tensor([[0] * (width - len(one)) + one.tolist() for one in ids], device=device),
            torch.tensor(
                [
                    [self._behind] * (width - len(one)) + list(range(start, start + len(one)))
                    for one, start in zip(ids, starts, strict=True)
                ],
                device=device,
            ),
        )

    def _keep(self, logits: Tensor) -> None:
        """What is no number in one place may have spread to earlier ones, which other prompts share."""
        whole = logits.isfinite().all(-1)
        for request, row in self._rows.items():
            if whole[row]:
                self._prefixes.keep(request.prompt_ids, self._kv, row)
