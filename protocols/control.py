"""The desired state of a pool: what its workers shall be doing."""

import secrets
import time


def default_desired() -> dict[str, str]:
    """Serving, with the weights that the workers start with; fields of `P:desired`."""
    return {
        "gate": "open",
        "mode": "release",
        "memory": "loaded",
        "weights": "0",
        "epoch": secrets.token_hex(8),
        "generation": "0",
        "by": "default",
        "at_ms": str(int(time.time() * 1000)),
    }
