"""The last step of a batch whose rows are all done: into order, or into Parquet, each in one replacement."""

from array import array

from producer_sdk.batch.journal import Journal, groups_of
from producer_sdk.batch.manifest import READ_BYTES, replacing
from producer_sdk.batch.parquet import write_parquet


def finish(journal: Journal, *, ordered: bool) -> None:
    """Bring the output into its last form; harmless when it has it already."""
    if ordered:
        put_into_order(journal)
    if journal.files.output != journal.files.rows:
        write_parquet(journal.files.rows, journal.files.output)


def put_into_order(journal: Journal) -> None:
    """Write the output anew in the order of the input, unless it has it."""
    path = journal.files.rows
    if not path.exists():
        return
    starts, sizes = array("q", [-1]) * len(journal.states), array("q", [0]) * len(journal.states)
    at, latest, sorted_already = 0, 0, True
    with path.open("rb", buffering=READ_BYTES) as file:
        for number, size_bytes, _ in groups_of(file):
            starts[number], sizes[number] = at, size_bytes
            at += size_bytes
            sorted_already, latest = sorted_already and number > latest, number
    if sorted_already:
        return
    with path.open("rb") as old, replacing(path) as file:
        for start, size_bytes in zip(starts, sizes, strict=True):
            if start >= 0:
                old.seek(start)
                file.write(old.read(size_bytes))
