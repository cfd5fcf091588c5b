"""`rolloutq batch`: a file of requests in, a file of answers out."""

from cyclopts import App

batch = App(
    name="batch", help="Answer a file of requests: run it here, or leave it to a batch worker."
)

batch.command("producer_sdk.cli.batch_run:run", name="run")
for _name in ("submit", "list_batches", "status", "attach", "cancel", "worker"):
    batch.command(f"producer_sdk.cli.batch_detached:{_name}", name=_name.partition("_")[0])
