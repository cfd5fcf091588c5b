"""New weights for lmdeploy's model: read into host memory, and found to be of the model's own names and shapes."""

from pathlib import Path
from typing import NoReturn

import msgspec
import torch
from torch import Tensor

from protocols.errors import WeightsRefused
from worker.engines.base import Weights
from worker.engines.torch_engine.parameters import Parameters, Place
from worker.engines.torch_engine.safetensors_file import Entry, SafetensorsFile
from worker.engines.torch_engine.weights import DTYPES, stage
from worker.engines.weight_files import find

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class ModelFiles:
    """The files that the engine started with, which tell what new ones must be like."""

    def __init__(self, directory: Path, *, ties_embeddings: bool) -> None:
        self._directory = directory
        self._ties_embeddings = ties_embeddings

    def stage(self, weights: Weights) -> list[tuple[str, Tensor]]:
        """Host tensors by name, in the types of the model's own files; without a path those files'.

        Raises WeightsRefused, and OSError where a file cannot be read. Takes as long as reading and hashing takes.
        """
        path = weights.path or str(self._directory)
        parameters = Parameters(self._places(), frozenset())
        staged = stage(msgspec.structs.replace(weights, path=path), parameters, _never)
        names = [place.names[0] for place in parameters.places]
        return list(zip(names, staged, strict=True))

    def _places(self) -> list[Place]:
        files = find(str(self._directory))
        entries: dict[str, Entry] = {}
        for path in sorted(files.loaded):
            with path.open("rb") as file:
                entries.update(SafetensorsFile(file, path.name).entries)
        strange = {one.dtype for one in entries.values()} - DTYPES.keys()
        if strange:
            raise WeightsRefused(
                f"the model's own weights are of type {', '.join(sorted(strange))}, and only {', '.join(DTYPES)} can "
                "be replaced"
            )
        return [self._place(name, entry, HEAD in entries) for name, entry in entries.items()]

    def _place(self, name: str, entry: Entry, has_head: bool) -> Place:
        tied = self._ties_embeddings and not has_head and name.endswith(EMBEDDING)
        shape = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        return Place([name, HEAD] if tied else [name], [shape])


def _never() -> NoReturn:
    raise AssertionError("weights without a path are those of the model's own files")
