"""The manifest: what a batch is, beside its output, replaced as a whole."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import IO, Literal

import msgspec

from protocols.errors import ConfigError

SCHEMA = 1
READ_BYTES = 1 << 20
Format = Literal["batch", "rollouts"]


class Input(msgspec.Struct, frozen=True):
    """The file that the batch was begun with."""

    name: str
    size_bytes: int
    sha256: str


class Parameters(msgspec.Struct, frozen=True):
    """What makes a row's job, or its line; a batch keeps them."""

    format: Format = "batch"
    protocol: str | None = None
    params: dict[str, msgspec.Raw] = {}


class Progress(msgspec.Struct, frozen=True):
    """How far it was when the manifest was written."""

    output_bytes: int = 0
    """That are on disk."""
    done: int = 0
    failed: int = 0
    invalid: int = 0
    rows: int = 0


class Manifest(msgspec.Struct, frozen=True):
    """One batch."""

    batch: str
    """Its id; the job of a line is `<batch>-<line>`."""
    input: Input
    output: str
    """The name of its file."""
    parameters: Parameters
    round: int = 0
    """How often failed rows were taken up again."""
    progress: Progress = Progress()
    schema: int = SCHEMA


_decoder = msgspec.json.Decoder(Manifest)


def load(path: Path) -> Manifest | None:
    """The manifest that is there; raises ConfigError where it is none."""
    try:
        return _decoder.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param="output") from None
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path}: not a manifest of a batch: {error}; --force begins anew", param="output"
        ) from None


def save(path: Path, manifest: Manifest) -> None:
    """Replace it."""
    with replacing(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


@contextlib.contextmanager
def replacing(path: Path) -> Generator[IO[bytes]]:
    """A file that takes the place of another at the end of the block: after a crash there is the old one or the new."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)  # of a process that died, or a link that leads elsewhere
    try:
        with fresh.open("xb", buffering=READ_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
