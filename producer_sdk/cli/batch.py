"""`rolloutq batch`: a file of requests in, a file of answers out. A command is imported only when it is asked for."""

from cyclopts import App

_RUN = """Answer every row of a file; the same command goes on where it was.

The first Ctrl-C waits for what is in flight, the second leaves it to the workers, the third cancels it. Exit code 1:
some rows have no answer; 2: the input is bad; 3: no server, or no live worker; 130: interrupted.
"""
_COMMANDS = {
    "run": ("batch_run:run", _RUN),
    "submit": ("batch_detached:submit", "Leave a batch to the batch workers, and print its id."),
    "list": ("batch_detached:list_batches", "List the batches that were left."),
    "status": ("batch_detached:status", "Show how a batch stands, from any machine."),
    "attach": ("batch_detached:attach", "Watch a batch until it has ended."),
    "cancel": ("batch_detached:cancel", "Cancel a batch and what its runner has in flight."),
    "worker": ("batch_detached:worker", "Run the batches that were left, until SIGTERM."),
}

batch = App(
    name="batch", help="Answer a file of requests: run it here, or leave it to a batch worker."
)

for _name, (_place, _summary) in _COMMANDS.items():
    batch.command(f"producer_sdk.cli.{_place}", name=_name, help=_summary)
