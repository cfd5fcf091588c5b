"""A safetensors file, read from front to back by ordinary reads while its bytes are hashed.

The library maps files into memory, and a mapped file that somebody shortens while it is read, or later while it is
used, ends the process with SIGBUS. Here such a file is refused, and the bytes hashed are those that are loaded.
"""

import math
import os
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Annotated

import msgspec

from protocols.errors import WeightsRefused
from worker.engines.weight_files import Hashed

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Of the types that weights may have."""
_MOST_HEADER_BYTES = 100_000_000
"""As the format says."""
_LENGTH_BYTES = 8
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Entry(msgspec.Struct, frozen=True):
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]

    @property
    def size_bytes(self) -> int:
        """In the file."""
        return self.data_offsets[1] - self.data_offsets[0]


class SafetensorsFile:
    """An open file whose header is read and found sound."""

    def __init__(self, file: BufferedIOBase, name: str) -> None:
        """Raises WeightsRefused where the file cannot be what it should be."""
        self.name = name
        self._file = file
        self._size_bytes = os.fstat(file.fileno()).st_size
        self._header = self._read_header()
        self.entries = self._parse(self._header[_LENGTH_BYTES:])
        """By name, in the order of their bytes."""
        self._check_offsets()

    def tensors(self, hashed: Hashed) -> Iterator[tuple[str, bytearray]]:
        """Each tensor's name and bytes, once; all bytes of the file go to `hashed`."""
        hashed(self._header)
        for name, entry in self.entries.items():
            read = bytearray(entry.size_bytes)
            if self._file.readinto(read) != len(read):
                raise WeightsRefused(f"{self.name}: it became shorter while it was read")
            hashed(read)
            yield name, read

    def _read_header(self) -> bytes:
        length = self._file.read(_LENGTH_BYTES)
        size_bytes = int.from_bytes(length, "little")
        if len(length) < _LENGTH_BYTES or size_bytes > _MOST_HEADER_BYTES:
            raise self._garbled("it is no safetensors file")
        header = self._file.read(size_bytes)
        if len(header) < size_bytes:
            raise self._garbled(f"{size_bytes} bytes are announced and {len(header)} are there")
        return length + header

    def _parse(self, header: bytes) -> dict[str, Entry]:
        try:
            raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
            raw.pop("__metadata__", None)
            entries = {name: msgspec.json.decode(one, type=Entry) for name, one in raw.items()}
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise self._garbled(str(error)) from error
        return dict(sorted(entries.items(), key=lambda one: one[1].data_offsets))

    def _check_offsets(self) -> None:
        """Tensors must lie one behind the other from the header's end to the file's, each as long as its shape says."""
        end = 0
        for name, entry in self.entries.items():
            width = DTYPE_BYTES.get(entry.dtype)
            fits = width is None or entry.size_bytes == width * math.prod(entry.shape)
            if entry.data_offsets[0] != end or entry.size_bytes < 0 or not fits:
                raise self._garbled(
                    f"the place of {name[:80]} does not fit its shape or neighbours"
                )
            end = entry.data_offsets[1]
        expected = len(self._header) + end
        if expected != self._size_bytes:
            raise WeightsRefused(
                f"{self.name}: it has {self._size_bytes} bytes, and its header tells of {expected}; it was cut off or "
                "is not written to its end"
            )

    def _garbled(self, reason: str) -> WeightsRefused:
        return WeightsRefused(f"{self.name}: its header is cut off or garbled: {reason}")
