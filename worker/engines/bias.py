"""`logit_bias`, whatever the engine."""

from protocols.errors import InvalidRequest
from protocols.rollout_state import SampleParams


def check_bias(params: SampleParams, vocabulary: int) -> None:
    """Raise InvalidRequest where a biased token is not in the vocabulary."""
    strange = [one for one, _ in params.logit_bias if not 0 <= one < vocabulary]
    if strange:
        raise InvalidRequest(
            f"`logit_bias`: token id {strange[0]}; the vocabulary ends at {vocabulary - 1}",
            param="logit_bias",
        )
