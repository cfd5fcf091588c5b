"""Test equipment: `python -m tests.lmdeploy.cpu_worker …` is `python -m worker …` with lmdeploy on the CPU."""

import sys

from tests.lmdeploy.cpu_shim import install
from worker.__main__ import main

if __name__ == "__main__":
    install()
    sys.exit(main())
