"""What the pool shall do: the desired state, kept by every worker and written back where the server lost it."""

import time

from protocols.control import default_desired

FRESH_WAIT_S = 3.0
"""How long a worker that has never seen a desired state waits for one that has, before it writes the default."""


class Desired:
    """What one worker knows of the desired state."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._since = time.monotonic()

    def saw(self, desired: dict[str, str]) -> None:
        """Remember what the server has; an empty one is a loss, not a wish."""
        if desired:
            self._known = desired

    def to_restore(self) -> dict[str, str] | None:
        """What to write where the server has none: what was known, or after a while the default."""
        if self._known:
            return self._known
        if time.monotonic() - self._since >= FRESH_WAIT_S:
            return default_desired()
        return None
