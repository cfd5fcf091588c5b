"""Free memory, given back to the system."""

import ctypes


def trim() -> None:
    """Give back what the C library keeps for later.

    glibc maps a large tensor by itself only until the first one is freed; then it takes such tensors from its heap
    (below 32 MB), and a heap keeps its holes. After SmolLM2's 513 MB were discarded, 510 MB came back with this and
    144 MB without it, and each update after the first left up to 440 MB behind.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # no other C library has it
    if give_back is not None:
        give_back(0)
