"""`python -m worker`, what `rolloutq worker` becomes."""

import asyncio
import gc
import logging
import sys

from protocols.errors import ConfigError, QueueError, RolloutError
from worker.config import Config
from worker.launcher import Launcher
from worker.probe import probe

USAGE, UNREACHABLE = 2, 3


def main() -> int:
    """Run a worker, or look at one; the exit code says what ended it, or what was seen."""
    try:
        config = Config.from_command(sys.argv[1:])
        logging.basicConfig(
            level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        if config.probe:
            logging.getLogger("rolloutq").setLevel(logging.ERROR)  # its one line says all
            return asyncio.run(probe(config, config.probe))
        if config.gpus:
            return asyncio.run(Launcher(config, sys.argv[1:]).run())
        _serve(config)
    except ConfigError as error:
        print(f"rolloutq worker: {error}", file=sys.stderr)
        return USAGE
    except QueueError as error:
        print(f"rolloutq worker: {error}", file=sys.stderr)
        return UNREACHABLE
    except RolloutError as error:
        print(f"rolloutq worker: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(config: Config) -> None:
    from worker.service import serve  # a probe has no use for what generates

    gc.freeze()  # what was imported stays: no collection, which holds up the event loop, need look at it
    asyncio.run(serve(config))


if __name__ == "__main__":
    sys.exit(main())
