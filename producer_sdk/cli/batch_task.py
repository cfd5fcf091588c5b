"""What `rolloutq batch run` and `rolloutq batch submit` are told alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from producer_sdk.batch.manifest import Format, Parameters
from producer_sdk.batch.parquet import library
from producer_sdk.batch.row import Rows
from producer_sdk.batch.work import Task
from protocols import codec
from protocols.errors import ConfigError, InvalidRequest

_params = msgspec.json.Decoder(dict[str, msgspec.Raw])


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class What:
    """A batch's parameters."""

    format: Format = "batch"
    """`batch`: lines in the shape of the row's family. `rollouts`: one a sample, with token ids."""
    protocol: str | None = None
    """The dialect of bare requests."""
    n: Annotated[int | None, Parameter(validator=Number(gte=1, lte=128))] = None
    """Samples of each row."""
    params: str = "{}"
    """Fields that are set in every request, a JSON object; they win over the row's own."""
    limit: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    """Only so many rows, from the start."""
    skip_invalid: Annotated[bool, Parameter(negative=())] = False
    """Do the good rows where some are bad."""
    ordered: Annotated[bool, Parameter(negative=())] = False
    """Put the output into the order of the input when all is done."""

    def parameters(self) -> Parameters:
        """What the manifest keeps; raises ConfigError and UnknownProtocol."""
        try:
            told = codec.parse_json(_params, self.params.encode())
        except InvalidRequest as error:
            raise ConfigError(f"--params: {error.message}", param="params") from None
        kept = {name: msgspec.Raw(bytes(value)) for name, value in sorted(told.items())}
        if self.n is not None:
            kept["n"] = msgspec.Raw(str(self.n).encode())
        return Parameters(self.format, self.protocol, kept)

    def rows(self) -> Rows:
        """What reads the input's lines."""
        return Rows(protocol=self.protocol, params=self.parameters().params)

    def task(
        self, source: Path, output: Path | None, *, retry_errors: bool = False, force: bool = False
    ) -> Task:
        """The whole; raises ConfigError where the output is none."""
        if output is None:
            raise ConfigError("-o: where shall the answers go?", param="output")
        if output.suffix == ".parquet":
            if self.format != "rollouts":
                raise ConfigError("-o: Parquet holds rollouts: --format rollouts", param="output")
            library()
        return Task(
            str(source),
            str(output),
            self.parameters(),
            self.limit,
            self.skip_invalid,
            self.ordered,
            retry_errors,
            force,
        )
