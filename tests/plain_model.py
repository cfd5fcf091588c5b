"""The reference for engines: transformers alone, on the same weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def listed(tensor: Tensor) -> list[Any]:
    """As nested lists; torch leaves the type of the items open."""
    items = cast("Any", tensor)
    return items.tolist()


class PlainModel:
    """A model in float32, run by transformers' own `generate` and by plain forward passes."""

    def __init__(self, directory: Path) -> None:
        loader = cast("Any", AutoModelForCausalLM)
        self._network = loader.from_pretrained(directory, dtype=torch.float32).eval()

    def greedy(self, prompts: Sequence[Sequence[int]], tokens: int, end: int) -> list[list[int]]:
        """The likeliest tokens behind each prompt, in one batch, up to and with the token `end`."""
        width = max(map(len, prompts))
        padded = torch.tensor([[end] * (width - len(one)) + list(one) for one in prompts])
        real = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
        made = self._network.generate(
            input_ids=padded,
            attention_mask=real,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=end,
        )
        responses: list[list[int]] = listed(made[:, width:])
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in responses]

    def logits(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Of every token where the responses are: `[response tokens, vocabulary]` each."""
        whole = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        width = max(map(len, whole))
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in whole])
        with torch.inference_mode():
            logits = self._network(padded).logits
        return [
            logits[i, len(prompt) - 1 : len(whole[i]) - 1].clone()
            for i, prompt in enumerate(prompts)
        ]

    def logprobs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Log-probabilities of every token where the responses are: `[response tokens, vocabulary]` each."""
        return [one.log_softmax(-1) for one in self.logits(prompts, responses)]


def of_tokens(logprobs: Tensor, ids: Sequence[int]) -> list[float]:
    """From `[tokens, vocabulary]`, those of `ids` `[tokens]`."""
    return listed(logprobs[torch.arange(len(ids)), torch.tensor(list(ids))])
