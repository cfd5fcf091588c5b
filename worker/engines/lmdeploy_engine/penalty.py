"""Bias of tokens, and the repetition penalty over prompt and response: processors of logits that lmdeploy calls."""

from collections.abc import Sequence

import torch
from torch import Tensor


class LogitBias:
    """What is added to the logits of some tokens, before anything else."""

    def __init__(self, bias: Sequence[tuple[int, float]]) -> None:
        """Token ids with their bias, at least one."""
        self._ids = torch.tensor([token_id for token_id, _ in bias])
        self._values = torch.tensor([value for _, value in bias])

    def __call__(self, _ids: Tensor, logits: Tensor) -> Tensor:
        """`logits` `[vocabulary]` with the bias."""
        self._ids, self._values = self._ids.to(logits.device), self._values.to(logits)
        return logits.index_add(0, self._ids, self._values)


class RepetitionPenalty:
    """Hugging Face's rule for one sample: what was seen becomes less likely, by a factor of its logit."""

    def __init__(self, penalty: float, prompt_ids: Sequence[int]) -> None:
        """`prompt_ids`: with what was kept, all that lmdeploy sees as the prompt."""
        self._penalty = penalty
        self._prompt = torch.tensor(sorted(set(prompt_ids)))

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """`logits` `[vocabulary]` penalised; `ids` `[tokens]` are all tokens so far, behind some padding."""
        self._prompt = self._prompt.to(ids.device)
        # the first tokens that are equal are padding, or of the prompt, or both
        behind = ids[(ids != ids[0]).cumsum(0) > 0]
        seen = torch.cat([self._prompt, behind])
        scores = logits[seen]
        return logits.index_copy(
            0, seen, torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        )
