"""What is done, on disk: the output, its manifest, and one byte of state a line.

The output is the truth. It is appended to and synced in blocks, and whoever opens it reads it all: whole lines are
rows that are done, what is torn behind the last synced block is cut off. A lock keeps a second runner away.
"""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

import msgspec
from msgspec.structs import astuple, replace

from producer_sdk.batch.answer import Seen, Written, seen_in, written
from producer_sdk.batch.manifest import (
    READ_BYTES,
    Input,
    Manifest,
    Parameters,
    Progress,
    load,
    replacing,
    save,
)
from producer_sdk.batch.survey import BLANK, DONE, FAILED, INVALID, Survey, lines_of
from producer_sdk.batch.tally import Tally
from protocols.errors import ConfigError, RolloutError

MANIFEST_S = 5.0


class Files(msgspec.Struct, frozen=True):
    """The files of one batch."""

    input: Path
    output: Path
    """What the user asked for."""
    rows: Path
    """What is appended to; the output itself, but for Parquet."""
    errors: Path
    manifest: Path
    lock: Path

    @classmethod
    def of(cls, input: Path, output: Path) -> "Files":
        """Those beside the output; raises ConfigError where the input is one of them."""
        name = output.stem if output.suffix in (".jsonl", ".parquet") else output.name
        made = cls(
            input,
            output,
            output.with_name(f"{name}.rows.jsonl") if output.suffix == ".parquet" else output,
            output.with_name(f"{name}.errors.jsonl"),
            output.with_name(f"{name}.manifest.json"),
            output.with_name(f".{name}.lock"),
        )
        if input.resolve() in [path.resolve() for path in astuple(made)[1:]]:
            raise ConfigError(
                f"{input}: the batch would write over it; choose another -o", param="output"
            )
        return made


class BatchHeld(ConfigError):
    """Another process is at the batch."""


@contextlib.contextmanager
def locked(files: Files) -> Generator[None]:
    """Hold the batch; raises BatchHeld while somebody else does, ConfigError where the folder is none."""
    try:
        file = files.lock.open("a")
    except OSError as error:
        raise ConfigError(f"{files.output}: {error.strerror}", param="output") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino != files.lock.stat().st_ino:
                raise BlockingIOError  # its last holder has removed it meanwhile
        except OSError:
            raise BatchHeld(
                f"{files.output}: another process is at this batch", param="output"
            ) from None
        try:
            yield
        finally:
            files.lock.unlink(missing_ok=True)


class Journal:
    """One batch, open for writing; `locked` is held around it."""

    def __init__(self, files: Files, manifest: Manifest, surveyed: Survey) -> None:
        """Read what earlier runs have done; raises ConfigError where the output is not this batch's."""
        self.files, self.manifest, self.states = files, manifest, surveyed.states
        self.rows, self.invalid = surveyed.rows, surveyed.invalid
        self.tally = Tally()
        self._written_bytes = self._recall()
        self._block: list[bytes] = []
        self._block_bytes = 0
        self._saved_s = time.monotonic()
        self._file: IO[bytes] = files.rows.open("ab", buffering=0)

    @property
    def waiting(self) -> int:
        """Rows that are not done."""
        return self.rows - self.invalid - self.tally.done - self.tally.failed

    @property
    def unsaved_bytes(self) -> int:
        """What `flush` would write."""
        return self._block_bytes

    def add(self, number: int, lines: bytes, seen: Seen) -> None:
        """Take in a row's lines; they are kept once `flush` has returned."""
        self._count(number, seen)
        self._block.append(lines)
        self._block_bytes += len(lines)

    def flush(self) -> None:
        """Write a block, and now and then the manifest; raises RolloutError where there is no room."""
        block = b"".join(self._block)
        if not block:
            return
        try:
            view = memoryview(block)
            while view:
                view = view[self._file.write(view) or 0 :]
            os.fsync(self._file.fileno())
            self._written_bytes += len(block)
            self._block, self._block_bytes = [], 0
            if time.monotonic() - self._saved_s >= MANIFEST_S:
                self._save()
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next run cuts it off
                os.ftruncate(self._file.fileno(), self._written_bytes)
            raise RolloutError(
                f"{self.files.rows}: {error.strerror}; make room and run it again"
            ) from None

    def _save(self) -> None:
        self.manifest = replace(
            self.manifest,
            progress=Progress(
                self._written_bytes,
                self.tally.done,
                self.tally.failed,
                self.invalid,
                self.rows,
            ),
        )
        save(self.files.manifest, self.manifest)
        self._saved_s = time.monotonic()

    def close(self) -> None:
        """Write what is left, and the errors: lines that failed or are none, as they came."""
        try:
            self.flush()
            self._save()
        finally:
            self._file.close()
        self._write_errors()

    def _write_errors(self) -> None:
        states, errors = self.states, self.files.errors
        if not self.tally.failed and not self.invalid:
            errors.unlink(missing_ok=True)
            return
        with replacing(errors) as file:
            for number, line in lines_of(self.files.input, len(states)):
                if states[number] in (FAILED, INVALID):
                    file.write(line if line.endswith(b"\n") else line + b"\n")

    def _count(self, number: int, seen: Seen) -> None:
        if self.states[number] == BLANK:  # beyond the limit of this run, and done before
            self.rows += 1
        elif self.states[number] == INVALID:  # good for an earlier version
            self.invalid -= 1
        self.states[number] = DONE if seen.fault is None else FAILED
        self.tally.add(seen)

    def _recall(self) -> int:
        """Mark what is done, and cut off what is torn; the size of the rest."""
        path = self.files.rows
        if not path.exists():
            _check_whole(self.files, self.manifest.progress, 0)
            return 0
        end = 0
        with path.open("rb+", buffering=READ_BYTES) as file:
            for number, size_bytes, group in groups_of(file):
                if not 0 < number < len(self.states) or self.states[number] in (DONE, FAILED):
                    raise ConfigError(
                        f"{path}: byte {end}: {group[0].id!r} is no row of this batch, or one that is there "
                        "already; choose another -o, or begin anew with --force",
                        param="output",
                    )
                self._count(number, merged([seen_in(line) for line in group]))
                end += size_bytes
            _check_whole(self.files, self.manifest.progress, end)
            file.truncate(end)
        return end


def groups_of(file: IO[bytes]) -> Iterator[tuple[int, int, list[Written]]]:
    """Row by row: its line of the input, the bytes of its lines, the lines; ends where one is torn."""
    group: list[Written] = []
    size_bytes = 0
    for raw in file:
        if not raw.endswith(b"\n"):
            return
        try:
            line = written(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        group.append(line)
        size_bytes += len(raw)
        if len(group) >= line.of:
            yield line.line, size_bytes, group
            group, size_bytes = [], 0


def merged(seen: list[Seen]) -> Seen:
    """What the lines of one row add together."""
    if len(seen) == 1:
        return seen[0]
    return Seen(
        next((one.fault for one in seen if one.fault is not None), None),
        sum(one.prompt_tokens for one in seen),
        sum(one.response_tokens for one in seen),
        tuple(reason for one in seen for reason in one.reasons),
    )


def opened(
    files: Files,
    surveyed: Survey,
    parameters: Parameters,
    *,
    force: bool = False,
    retry_errors: bool = False,
) -> Journal:
    """Begin a batch, or go on with the one that is there.

    Raises ConfigError where input, output or parameters are others than it was begun with, unless `force` begins anew.
    """
    if force:
        for path in (files.manifest, files.rows, files.output, files.errors):
            path.unlink(missing_ok=True)
    manifest = load(files.manifest)
    if manifest is None:
        if files.rows.exists() and files.rows.stat().st_size:
            raise ConfigError(
                f"{files.rows} is there, but not the manifest of a batch ({files.manifest.name}): choose "
                "another -o, or write over it with --force",
                param="output",
            )
        told = Input(files.input.name, surveyed.size_bytes, surveyed.sha256)
        batch = f"b{secrets.token_hex(6)}"
        manifest = Manifest(batch, told, files.output.name, parameters)
        save(files.manifest, manifest)
    else:
        _compare(files, manifest, surveyed, parameters)
    if retry_errors:
        _check_whole(files, manifest.progress, _readable_bytes(files.rows))
        manifest = replace(manifest, round=manifest.round + 1, progress=Progress())
        save(files.manifest, manifest)
        _drop_failed(files.rows)
    return Journal(files, manifest, surveyed)


def _compare(files: Files, manifest: Manifest, surveyed: Survey, parameters: Parameters) -> None:
    if manifest.output != files.output.name:
        raise ConfigError(
            f"{files.manifest} is that of the batch whose output is {manifest.output}: choose another -o",
            param="output",
        )
    if manifest.input.sha256 != surveyed.sha256:
        raise ConfigError(
            f"{files.input} is not what {files.output} was begun with ({manifest.input.size_bytes} bytes then, "
            f"{surveyed.size_bytes} now): choose another -o, or drop the old output with --force",
            param="input",
        )
    if _told(manifest.parameters) != _told(parameters):
        raise ConfigError(
            f"{files.output} was begun with other parameters ({_told(manifest.parameters)}): use them, choose "
            "another -o, or drop the old output with --force",
            param="output",
        )


def _told(parameters: Parameters) -> str:
    """In words, without the spaces that Raw values have: the manifest is kept with others."""
    return msgspec.json.format(msgspec.json.encode(parameters), indent=-1).decode()


def _check_whole(files: Files, progress: Progress, readable_bytes: int) -> None:
    """Raises ConfigError where the output has lost what was on disk."""
    if readable_bytes < progress.output_bytes:
        raise ConfigError(
            f"{files.rows}: {progress.output_bytes} bytes were written, and only {readable_bytes} can be read; "
            "bring it back, or begin anew with --force",
            param="output",
        )


def _readable_bytes(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb", buffering=READ_BYTES) as file:
        return sum(size_bytes for _, size_bytes, _ in groups_of(file))


def _drop_failed(path: Path) -> None:
    """Leave the rows that have their answer."""
    if not path.exists():
        return
    with path.open("rb") as read, path.open("rb") as copied, replacing(path) as file:
        for _, size_bytes, group in groups_of(read):
            lines = copied.read(size_bytes)
            if merged([seen_in(line) for line in group]).fault is None:
                file.write(lines)
