"""Test equipment: with this folder in PYTHONPATH, the workers of a launcher have lmdeploy on the CPU.

Python imports a module of this name at its start. The launcher itself, which sets CUDA_VISIBLE_DEVICES for its workers
and nothing else, stays as it is.
"""

import os

if "CUDA_VISIBLE_DEVICES" in os.environ:
    from tests.lmdeploy.cpu_shim import install

    install()
