"""Bearer tokens: who may call, and for what. Knows gRPC's metadata and no method names.

The file, which is read again when it changes:

    [[token]]
    name = "gallery"                # for logs, and for fairness among clients
    sha256 = "9f86d0..."            # of the token; or token = "..." itself
    scopes = ["infer"]              # infer, admin
    expires = 2027-01-01T00:00:00Z  # if it does
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import threading
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .errors import ForbiddenError, UnauthenticatedError

log = logging.getLogger("nuwa.runtime")

HEADER = "authorization"
SCHEME = "bearer "
SCOPES = ("infer", "admin")
SHORTEST = 16  # characters of a token
LOOK_SECONDS = 1.0  # how often the file is looked at


@dataclass(frozen=True)
class Token:
    """digest: SHA-256 of it; expires: seconds since the epoch, None for never."""

    name: str
    digest: bytes
    scopes: frozenset[str]
    expires: float | None


class Tokens:
    """Those of a file. ValueError naming what is wrong with it, when it is read first.

    A changed file that is wrong changes nothing, which the log says.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = path, now
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._tokens = read_tokens(path)
        self._looked = time.monotonic()

    def check(self, metadata: Iterable[tuple[str, str | bytes]], scope: str) -> Token:
        """Whose token a call has. UnauthenticatedError without a good one, ForbiddenError without
        the scope.
        """
        self._look()
        given = next((value for key, value in metadata if key == HEADER), None)
        if given is None:
            raise UnauthenticatedError(f"metadata {HEADER!r} is missing: 'Bearer TOKEN'")
        text = given.decode(errors="replace") if isinstance(given, bytes) else given
        if not text.lower().startswith(SCHEME):
            raise UnauthenticatedError(f"metadata {HEADER!r} is not of the form 'Bearer TOKEN'")
        digest = hashlib.sha256(text[len(SCHEME) :].strip().encode()).digest()
        # All are compared, whichever it is, and each in constant time.
        found = [each for each in self._tokens if hmac.compare_digest(each.digest, digest)]
        if not found:
            raise UnauthenticatedError("the token is not known")
        token = found[0]
        if token.expires is not None and self._now() >= token.expires:
            raise UnauthenticatedError("the token has expired")
        if scope not in token.scopes:
            raise ForbiddenError(
                f"the token has the scopes {', '.join(sorted(token.scopes))}, and not {scope}"
            )
        return token

    def _look(self) -> None:
        with self._lock:
            if time.monotonic() - self._looked < LOOK_SECONDS:
                return
            self._looked = time.monotonic()
            try:
                stamp = _stamp(self._path)
                if stamp == self._stamp:
                    return
                self._tokens = read_tokens(self._path)
                self._stamp = stamp
                log.info("%s: %d tokens", self._path, len(self._tokens))
            except (OSError, ValueError) as error:
                log.error("the tokens stay as they were: %s", error)


def read_tokens(path: Path) -> tuple[Token, ...]:
    """ValueError naming the token and what is wrong with it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    entries = table.pop("token", [])
    if table or not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has to have [[token]] tables, at least one, and nothing else")
    tokens = [_token(entry, f"{path}: token {n}") for n, entry in enumerate(entries, 1)]
    names = [each.name for each in tokens]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: names of tokens are {', '.join(names)}; each may be there once")
    return tuple(tokens)


def _token(entry: Any, where: str) -> Token:
    known = {"name", "token", "sha256", "scopes", "expires"}
    if not isinstance(entry, dict) or not set(entry) <= known:
        raise ValueError(f"{where} may say {', '.join(sorted(known))}")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has no name")
    where = f"{where} ({name})"
    scopes = entry.get("scopes")
    if not isinstance(scopes, list) or not scopes or not set(map(str, scopes)) <= set(SCOPES):
        raise ValueError(f"{where} has the scopes {scopes!r}; choose among {', '.join(SCOPES)}")
    expires = entry.get("expires")
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise ValueError(f"{where}: expires is not a time with an offset, 2027-01-01T00:00:00Z")
    return Token(
        name,
        _digest(entry, where),
        frozenset(scopes),
        None if expires is None else expires.timestamp(),
    )


def _digest(entry: dict[str, Any], where: str) -> bytes:
    plain, hashed = entry.get("token"), entry.get("sha256")
    if (plain is None) == (hashed is None):
        raise ValueError(f"{where} has to have one of token and sha256")
    if plain is not None:
        if not isinstance(plain, str) or len(plain) < SHORTEST:
            raise ValueError(f"{where}: token is not a text of at least {SHORTEST} characters")
        return hashlib.sha256(plain.encode()).digest()
    try:
        digest = bytes.fromhex(str(hashed))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError(f"{where}: sha256 is not 64 hexadecimal digits")
    return digest


def _stamp(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino
