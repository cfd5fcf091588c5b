"""Rollouts as a Parquet file: one row a sample, written in groups, so that memory stays small."""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from producer_sdk.batch.manifest import replacing
from protocols.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

GROUP_ROWS = 2000


def library() -> "tuple[ModuleType, ModuleType]":
    """Pyarrow and its Parquet part; raises ConfigError where they are missing."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'rolloutq[parquet]'") from None


def write_parquet(rows: Path, output: Path) -> None:
    """Make the Parquet file of rollout lines, and put it in place whole."""
    pa, parquet = library()
    schema = _schema(pa)
    with (
        rows.open("rb") as lines,
        replacing(output) as file,
        parquet.ParquetWriter(file, schema) as writer,
    ):
        group: list[dict[str, Any]] = []
        for line in lines:
            group.append(_record(json.loads(line)))
            if len(group) == GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _schema(pa: Any) -> Any:  # noqa: ANN401 - pyarrow has no types
    return pa.schema(
        [
            ("id", pa.string()),
            ("custom_id", pa.string()),
            ("index", pa.int32()),
            ("of", pa.int32()),
            ("status", pa.string()),
            ("finish_reason", pa.string()),
            ("prompt_ids", pa.list_(pa.uint32())),
            ("response_ids", pa.list_(pa.uint32())),
            ("logprobs", pa.list_(pa.float32())),
            ("model_steps", pa.list_(pa.int64())),
            ("text", pa.string()),
            ("error_code", pa.string()),
            ("error_message", pa.string()),
        ]
    )


def _record(line: dict[str, Any]) -> dict[str, Any]:
    fault: dict[str, str] = line.pop("error") or {}
    return line | {"error_code": fault.get("code"), "error_message": fault.get("message")}
