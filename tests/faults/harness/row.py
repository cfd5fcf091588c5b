"""The table of faults: one line each, printed when all tests are over."""

from dataclasses import dataclass, fields


@dataclass
class Row:
    """What became of one fault."""

    fault: str
    tried: int = 0
    """How often the fault was brought about."""
    happened: int = 0
    """How often it hit what it was meant to hit."""
    lost: int = 0
    """Accepted jobs without their right reply."""
    double: int = 0
    """Jobs with more than one terminal reply in the server's record."""
    recovery_s: float | None = None
    """The longest time from the fault until work went on."""
    note: str = ""
    verdict: str = "not met"


HEADS = ("fault", "tried", "happened", "lost", "double", "recovery", "verdict", "")


def lines_of(rows: list[Row]) -> list[str]:
    """The table as text, numbers to the right."""
    cells = [HEADS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADS))]
    return [
        "  ".join(
            cell.rjust(width) if 0 < column < 6 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    recovery = "-" if row.recovery_s is None else f"{row.recovery_s:.2f} s"
    counts = (str(getattr(row, name)) for name in ("tried", "happened", "lost", "double"))
    return (row.fault, *counts, recovery, row.verdict, row.note)


assert len(fields(Row)) == len(HEADS)
