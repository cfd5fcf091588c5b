"""Which path is which protocol."""

from protocols.errors import MethodNotAllowed, RouteNotFound

PROTOCOLS = {
    "/v1/chat/completions": "openai.chat",
    "/v1/completions": "openai.completions",
    "/v1/messages": "claude.messages",
    "/v1/messages/count_tokens": "claude.count_tokens",
    "/generate": "generate",
}
"""What is posted there is a job of this protocol; a query does not matter."""
WHOLE = ("claude.count_tokens",)
"""Protocols without streams; their dialect says so where one is asked for."""
MODELS = "/v1/models"
SHOWN_CHARS = 120


def protocol_of(method: str, path: str) -> str:
    """The protocol of a job; raises RouteNotFound, or MethodNotAllowed."""
    protocol = PROTOCOLS.get(path)
    if protocol is None:
        raise unknown(path)
    allow(method, "POST", path)
    return protocol


def is_models(path: str) -> bool:
    """Whether it is the list of models, or one of them."""
    return path == MODELS or path.startswith(f"{MODELS}/")


def allow(method: str, wanted: str, path: str) -> None:
    """Raise MethodNotAllowed for another method."""
    if method != wanted:
        raise MethodNotAllowed(f"{path[:SHOWN_CHARS]} takes {wanted} alone", param="method")


def unknown(path: str) -> RouteNotFound:
    """What to say of a path that is none."""
    known = ", ".join((*PROTOCOLS, MODELS))
    return RouteNotFound(f"no route {path[:SHOWN_CHARS]!r}; jobs go to {known}")


def shape_of(path: str, *, claude: bool = False) -> str:
    """The protocol whose error body an answer at this path has."""
    return PROTOCOLS.get(path, "claude.messages" if claude and is_models(path) else "openai.chat")
