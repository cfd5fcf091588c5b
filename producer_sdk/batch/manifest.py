"""The manifest: what a batch is, beside its output, replaced as a whole."""

import os
from pathlib import Path
from typing import Literal

import msgspec

from protocols.errors import ConfigError

SCHEMA = 1
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
    finished: bool = False


class Manifest(msgspec.Struct, frozen=True):
    """One batch."""

    batch: str
    """Its id; the job of a line is `<batch>-<line>`."""
    input: Input
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
    """Replace it: after a crash there is the old one or the new one."""
    replace(path, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def replace(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(fresh, path)


def put_in_place(fresh: Path, path: Path) -> None:
    """Rename a file that is on disk, and the name too."""
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
