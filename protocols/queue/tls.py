"""TLS: what a `rediss://` URL may say of it, and what to say where it fails."""

import contextlib
import os
import ssl
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from protocols.errors import ConfigError

FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
OPTIONS = (*FILES, "ssl_check_hostname", "ssl_cert_reqs")

_SWITCH = {"true": True, "false": False}
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


def tls_options(told: Mapping[str, str]) -> dict[str, Any]:
    """What redis-py is given for the options of a `rediss://` URL; raises ConfigError.

    The server's certificate and host name are verified unless the URL says otherwise; redis-py 5
    by itself would not look at the name.
    """
    wanted = told.get("ssl_cert_reqs", "required")
    name = told.get("ssl_check_hostname", "true").lower()
    if wanted not in ("required", "none"):
        raise _wrong("ssl_cert_reqs", "required or none")
    if name not in _SWITCH:
        raise _wrong("ssl_check_hostname", "true or false")
    files = {option: told[option] for option in FILES if option in told}
    _check_files(files)
    verified = _SWITCH[name] and wanted == "required"
    return files | {"ssl_cert_reqs": wanted, "ssl_check_hostname": verified}


def _wrong(option: str, why: str) -> ConfigError:
    return ConfigError(f"url: {option}: {why}", param="url")


def _check_files(files: Mapping[str, str]) -> None:
    """Now, not at each attempt to connect."""
    for option, path in files.items():
        if not os.access(path, os.R_OK) or os.path.isdir(path):
            raise _wrong(option, f"no readable file {path}")
    if ("ssl_certfile" in files) != ("ssl_keyfile" in files):
        raise _wrong("ssl_certfile", "a certificate and its ssl_keyfile go together")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if "ssl_ca_certs" in files:
        with _readable("ssl_ca_certs", "no certificates in PEM form"):
            context.load_verify_locations(files["ssl_ca_certs"])
    if "ssl_certfile" in files:
        trouble = "not a certificate and its key, without passphrase, in PEM form"
        with _readable("ssl_certfile", trouble):  # without a password, OpenSSL would ask a terminal
            context.load_cert_chain(files["ssl_certfile"], files["ssl_keyfile"], password="")


@contextlib.contextmanager
def _readable(option: str, trouble: str) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError):
        raise _wrong(option, trouble) from None


def tls_trouble(error: BaseException) -> str | None:
    """What is wrong and what to do, where TLS is why a connection was not made; else None."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"shows a certificate that is not accepted ({cause.verify_message.rstrip('.')}); "
                "give the authority that signed it as ssl_ca_certs in the URL, and the host as "
                "the certificate names it"
            )
        if isinstance(cause, ssl.SSLError):
            return _reason(str(cause.reason or cause))
    return None


def _reason(reason: str) -> str:
    if reason in _NO_TLS:
        return "does not speak TLS on this port; use its TLS port, or redis:// without TLS"
    if "ALERT" in reason:
        return (
            f"refuses this client's side of TLS ({reason}); give a certificate that it knows as "
            "ssl_certfile and ssl_keyfile in the URL"
        )
    return f"cannot be reached by TLS ({reason})"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of, which redis-py wraps."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
