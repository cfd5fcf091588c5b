"""`rolloutq worker`: this process becomes the worker's."""

import os
import sys
from typing import Annotated, Never

from cyclopts import Parameter


def worker(*flags: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> Never:
    """Replace this process, so that signals reach the worker; `-P`, so that a `worker.py` here does not."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", "worker", *flags])
