"""What commands print: JSON on one line for machines, tables for people."""

import sys
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from protocols import codec

PIPE_COLUMNS = 140
"""How wide tables are where nobody's terminal says."""

AsJson = Annotated[bool, Parameter(name="--json", negative=(), show_default=False)]


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    print(codec.encode_json(value).decode())


def show(*parts: Table | Text | str) -> None:
    """Tables and lines on standard output; what stands in them is never read as markup."""
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    console = Console(width=width, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def say(line: str) -> None:
    """A line of progress, on standard error at once."""
    print(line, file=sys.stderr, flush=True)
