"""Who asks, and what they may: keys in headers, and the role of each."""

import hashlib
import hmac
from collections.abc import Mapping
from enum import IntEnum

from producer_sdk.gateway.settings import PREFIX, Settings, split
from protocols.errors import KeyMissing, KeyRefused

HEADER_CHARS = 512


class Role(IntEnum):
    """What somebody may; each includes those before it."""

    NOBODY = 0
    INFERENCE = 1
    ADMIN = 2


class Keyring:
    """All keys, as digests: they are compared whole, each of them, in a time that tells nothing."""

    def __init__(self, settings: Settings) -> None:
        roles = ((Role.INFERENCE, settings.keys), (Role.ADMIN, settings.admin_keys))
        self._keys = [(_digest(key), role) for role, keys in roles for key in split(keys)]

    @property
    def open(self) -> bool:
        """Whether there are no keys: whoever is on this machine may ask."""
        return not self._keys

    def check(self, headers: Mapping[str, str], needed: Role) -> str:
        """Who asks, as a word that is no secret and differs by key; raises KeyMissing or KeyRefused."""
        if needed is Role.NOBODY:
            return ""
        if self.open:
            _refuse_browser(headers)
            return ""
        caller = _digest(_presented(headers))
        matches = [role for key, role in self._keys if hmac.compare_digest(key, caller)]
        if not matches:
            raise KeyMissing(
                "the API key is missing or unknown; send one as `Authorization: Bearer …` or `x-api-key`"
            )
        if max(matches) < needed:
            raise KeyRefused(f"this key may not command workers; use one of {PREFIX}ADMIN_KEYS")
        return caller.hex()


def _presented(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    found = token.strip() if scheme.lower() == "bearer" else ""
    return (found or headers.get("x-api-key", ""))[:HEADER_CHARS]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refuse_browser(headers: Mapping[str, str]) -> None:
    """Without keys, no page that somebody on this machine looks at may ask in their name."""
    if "origin" in headers:
        raise KeyRefused(
            f"requests from a web page need a key; set {PREFIX}KEYS, and {PREFIX}ADMIN_KEYS for commands"
        )
