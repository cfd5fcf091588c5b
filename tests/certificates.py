"""Throw-away certificates for tests of TLS, made by openssl."""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

LIMIT_S = 30


class Pair(NamedTuple):
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates; `ca` is what its followers trust."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self.ca = folder / f"{name}.crt"
        self._key = folder / f"{name}.key"
        wanted = ["-x509", "-days", "2", "-subj", f"/CN={name}", "-out", str(self.ca)]
        _openssl("req", *_new_key(self._key), *wanted)

    def signed(self, name: str, *, alternatives: str = "") -> Pair:
        """A certificate, such as for `alternatives` DNS:localhost,IP:127.0.0.1."""
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        request = self._folder / f"{name}.csr"
        _openssl("req", *_new_key(pair.key), "-subj", f"/CN={name}", "-out", str(request))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternatives}\n" if alternatives else "")
        signing = ["-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self._key)]
        made = ["-CAcreateserial", "-days", "2", "-out", str(pair.certificate)]
        _openssl("x509", *signing, *made, "-extfile", str(extensions))
        return pair


def _new_key(path: Path) -> list[str]:
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    return [*curve, "-nodes", "-keyout", str(path)]


def _openssl(*words: str) -> None:
    binary = shutil.which("openssl")
    if binary is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    ran = subprocess.run([binary, *words], capture_output=True, timeout=LIMIT_S, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
