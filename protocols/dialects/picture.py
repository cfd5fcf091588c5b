"""Where a picture may come from."""

from protocols.errors import InvalidRequest
from protocols.message import Image

SCHEMES = ("https:", "http:", "data:")


def image_of(url: str, field: str) -> Image:
    """The block; raises InvalidRequest for an address that is neither on the web nor holds the bytes."""
    if not url.startswith(SCHEMES):
        raise InvalidRequest(f"`{field}`: Expected an https: or data: URL", param=field)
    return Image(url)
