"""Test equipment: lmdeploy 0.18's own api_server over its own PyTorch engine, on the CPU.

    python -m tests.lmdeploy_server.cpu_server MODEL PORT

As in production the engine has a process of its own, which begins by importing this module under another name.
"""

# pyright: basic, reportMissingImports=false
# lmdeploy has an environment of its own

import contextlib
import sys
from multiprocessing import managers
from typing import Any, cast

from tests.lmdeploy.cpu_shim import install

SAMPLES_AT_ONCE = 4


def main(model: str, port: int) -> None:
    """Serve until it is ended."""
    from lmdeploy.messages import PytorchEngineConfig
    from lmdeploy.serve.openai import api_server

    api_server.serve(
        model,
        backend="pytorch",
        backend_config=PytorchEngineConfig(
            logprobs_mode="raw_logprobs", max_batch_size=SAMPLES_AT_ONCE
        ),
        server_name="127.0.0.1",
        server_port=port,
        enable_abort_handling=True,
        log_level="WARNING",
    )


def outlive_the_manager() -> None:
    """Go on where lmdeploy's server has read the engine's port, and ended its manager, before that said its last."""
    proxy = cast("Any", managers).AcquirerProxy  # its types lack it
    usual = proxy.__exit__

    def leave(self: object, *error: object) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            usual(self, *error)

    proxy.__exit__ = leave


if __name__ in {"__main__", "__mp_main__"}:
    install()

if __name__ == "__mp_main__":
    outlive_the_manager()

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
