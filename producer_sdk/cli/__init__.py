"""The command `rolloutq`. Each command is a module of its own, imported only when it is asked for.

Exit codes: 0 good, 1 some jobs failed, 2 usage or bad input, 3 no Redis or no live worker,
130 interrupted. Commands return one or raise; here every error becomes one line and a code.
"""

import importlib.metadata
import logging
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from protocols.errors import (
    ConfigError,
    InvalidCommand,
    NoLiveWorker,
    PoolNotPrepared,
    RequestError,
    RolloutError,
    ServerUnavailable,
    without_login,
)

GOOD, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

_COMMANDS = {
    "demo": "Show it: real prompts, an embedded server, two workers, one of them killed.",
    "up": "Keep an embedded server and workers running.",
    "worker": "Serve a pool; becomes `python -m worker`.",
    "submit": "Send a job and print its answer.",
    "job": "Tell what became of a job.",
    "cancel": "Cancel a job, or all jobs of a run.",
    "control": "Pause, continue, offload, update, shut down: command the workers.",
    "batch": "Answer a file of requests: run it here, or leave it to a batch worker.",
    "dead": "List, show, requeue or purge dead letters.",
    "gateway": "Answer OpenAI's and Anthropic's HTTP as jobs of a pool.",
    "status": "Show a pool's live workers and what waits for them.",
}


def main() -> int:
    """What the installed command runs."""
    # A command says itself what it waits for, and what a link would warn of is the error that ends it.
    logging.getLogger("rolloutq").setLevel(logging.ERROR)
    return run(sys.argv[1:])


def run(argv: Sequence[str]) -> int:
    """Run a command line, without the program's name; the exit code."""
    try:
        code = _app()(
            argv,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        return _tell(f"{without_login(str(error))} See `rolloutq --help`.", USAGE)
    except RolloutError as error:
        return _tell(error.message, exit_code(error))
    except KeyboardInterrupt:
        return _tell("interrupted", INTERRUPTED)
    return code or GOOD


def exit_code(error: RolloutError) -> int:
    """What a command that met this error exits with."""
    if isinstance(error, ServerUnavailable | PoolNotPrepared | NoLiveWorker):
        return UNREACHABLE
    if isinstance(error, ConfigError | RequestError | InvalidCommand):
        return USAGE
    return FAILED


def _app() -> App:
    app = App(
        name="rolloutq",
        help="Durable LLM rollouts over Redis: every job is answered once.",
        version=_version,
        suppress_keyboard_interrupt=False,
    )
    for name, summary in _COMMANDS.items():
        path = f"producer_sdk.cli.{name}:{name}"
        if name == "worker":  # its help is the worker's own
            app.command(path, name=name, help=summary, help_flags=[], version_flags=[])
        else:
            app.command(path, name=name, help=summary)
    return app


def _version() -> str:
    try:
        return importlib.metadata.version("rolloutq")
    except importlib.metadata.PackageNotFoundError:
        return "not installed, run from its source"


def _tell(message: str, code: int) -> int:
    print(f"rolloutq: {message}", file=sys.stderr)
    return code
