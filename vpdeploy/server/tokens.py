"""The token file: many tokens, each with its scopes and tasks; it is read again when it changes.

::

    [[token]]
    name = "shop"                        # for the log
    token = "dP3..."                     # or sha256 = "9f86d0...", its digest in hexadecimal
    scopes = ["infer"]                   # of infer, metrics, admin
    tasks = ["flowers", "birds"]         # all of them if left out
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpdeploy.errors import SpecError
from vpdeploy.format.task import check_task_name
from vpdeploy.server.access import EVERY_SCOPE, USER_SCOPES, Access, Grant, Scope, token_digest
from vpdeploy.toml import name_advice, parse_toml

_log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""How long a change of the file may go unnoticed, in s."""

_SETTLED_S = 2.0
"""A file that is younger may change once more within the resolution of its time of change, in s."""

_MAX_BYTES = 256 << 10
_KEYS = ("name", "token", "sha256", "scopes", "tasks")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")

_Signature = tuple[int, int, int]


class TokenFile:
    """Tokens from a file, which is looked at once a second while requests come. Any thread may ask.

    Args:
        path: The file.
        taken: Digests of tokens that it may not hold, as they are given elsewhere.
        clock: Returns the time, in s; it never goes backwards.

    Raises:
        SpecError: The file cannot be read, or an entry is wrong.
    """

    def __init__(
        self, path: Path, *, taken: frozenset[bytes] = frozenset(), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._taken = taken
        self._clock = clock
        self._lock = threading.Lock()
        self._complaint = ""
        self._looked_at = clock()
        self._seen, self._grants = self._read()

    def grants(self) -> Mapping[bytes, Grant]:
        """Return what each token grants, by its digest; of a file that became unusable, what it said before."""
        now = self._clock()
        if now - self._looked_at >= _LOOK_S and self._lock.acquire(blocking=False):
            try:
                self._looked_at = now
                self._look()
            finally:
                self._lock.release()
        return self._grants

    def _look(self) -> None:
        """Read the file if it changed."""
        try:
            if self._seen is not None and _signature(self._path) == self._seen:
                return
            seen, grants = self._read()
        except (SpecError, OSError) as error:
            complaint = " ".join(str(error).split())
            if complaint != self._complaint:
                _log.error("the tokens stay as they were: %s", complaint)
            self._seen, self._complaint = None, complaint
            return
        if grants != self._grants or self._complaint:
            _log.info("tokens read again, %d of them", len(grants))
        self._seen, self._grants, self._complaint = seen, grants, ""

    def _read(self) -> tuple[_Signature | None, dict[bytes, Grant]]:
        """Return the file's signature, if the file is old enough for it to tell, and its grants."""
        try:
            signature = _signature(self._path)
            with self._path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise SpecError(f"{self._path}: cannot be read: {error.strerror}; expected a file of tokens") from None
        if len(data) > _MAX_BYTES:
            raise SpecError(f"{self._path}: a file of tokens should have at most {_MAX_BYTES} bytes")
        grants = _parse(data, self._path)
        if self._taken & grants.keys():
            raise SpecError(f"{self._path}: holds a token that is given as an option too; give it once")
        age_s = time.time() - signature[0] / 1e9
        return (signature if age_s > _SETTLED_S else None), grants


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _parse(data: bytes, path: Path) -> dict[bytes, Grant]:
    try:
        fields = parse_toml(data.decode())
    except (ValueError, RecursionError) as error:
        # A parser's words may quote the line, and with it a token.
        line = next(iter(re.findall(r"line \d+", str(error))), "")
        raise SpecError(f"{path}: not valid TOML{', ' + line if line else ''}") from None
    for key in fields:
        if key != "token":
            raise SpecError(f"{path}: unknown entry '{key[:40]}'; a token begins with [[token]]")
    entries = fields.get("token")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise SpecError(f"{path}: holds no token; each begins with [[token]]")
    grants: dict[bytes, Grant] = {}
    names: set[str] = set()
    for index, entry in enumerate(entries, 1):
        place = f"{path}: token {index}"
        digest, grant = _entry(entry, place)
        if digest in grants or grant.name in names:
            raise SpecError(f"{place}: has the {'token' if digest in grants else 'name'} of another")
        grants[digest] = grant
        names.add(grant.name)
    return grants


def _entry(entry: dict[str, Any], place: str) -> tuple[bytes, Grant]:
    """Read one token: its digest, and what it grants."""
    for key in entry:
        if key not in _KEYS:
            raise SpecError(f"{place}: unknown key '{key[:40]}'; {name_advice(key, _KEYS)}")
    name = entry.get("name")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 64:
        raise SpecError(f"{place}: 'name' should be 1 to 64 printable characters; it names the token in the log")
    place = f"{place} ('{name}')"
    if ("token" in entry) == ("sha256" in entry):
        raise SpecError(f"{place}: expected one of 'token' and 'sha256'")
    scopes = frozenset(_scope(text, place) for text in _texts(entry, "scopes", place))
    tasks = None
    if "tasks" in entry:
        if Scope.METRICS in scopes:
            raise SpecError(f"{place}: metrics tell of all tasks; take the scope or 'tasks' away")
        tasks = frozenset(_task(text, place) for text in _texts(entry, "tasks", place))
    return _digest(entry, place), Grant(name=name, scopes=scopes, tasks=tasks)


def _digest(entry: dict[str, Any], place: str) -> bytes:
    if "sha256" in entry:
        text = entry["sha256"]
        if not isinstance(text, str) or not _DIGEST.fullmatch(text):
            raise SpecError(f"{place}: 'sha256' should be 64 hexadecimal digits")
        return bytes.fromhex(text)
    token = entry["token"]
    if not isinstance(token, str):
        raise SpecError(f"{place}: 'token' should be text")
    try:
        return token_digest(check_token(token).encode())
    except SpecError as error:
        raise SpecError(f"{place}: {error}") from None


def read_access(*, token: str | None, admin_token: str | None, token_file: Path | None) -> Access:
    """Return who may do what, as the options say.

    Args:
        token: A token for all but the administration; None where there is none.
        admin_token: A token for everything; None where there is none.
        token_file: A file of more tokens; None where there is none.

    Raises:
        SpecError: A token cannot be sent, is given twice, or the file is wrong.
    """
    tokens: dict[bytes, Grant] = {}
    for name, given, scopes in (("token", token, USER_SCOPES), ("admin-token", admin_token, EVERY_SCOPE)):
        if given is not None:
            digest = token_digest(check_token(given).encode())
            if digest in tokens:
                raise SpecError("the token and the admin token are the same; the admin token should be another")
            tokens[digest] = Grant(name=name, scopes=scopes)
    return Access(tokens, None if token_file is None else TokenFile(token_file, taken=frozenset(tokens)))


def check_token(token: str) -> str:
    """Return a token that a header can carry.

    Raises:
        SpecError: It is empty, or holds other characters than the visible ones of ASCII.
    """
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise SpecError("the token should be printable ASCII characters without blanks, and at least one of them")
    return token


def _texts(entry: dict[str, Any], key: str, place: str) -> list[str]:
    values = entry.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise SpecError(f"{place}: '{key}' should be a list of names, and at least one")
    return values


def _scope(text: str, place: str) -> Scope:
    try:
        return Scope(text)
    except ValueError:
        known = [scope.value for scope in Scope]
        raise SpecError(f"{place}: unknown scope '{text[:40]}'; {name_advice(text, known)}") from None


def _task(text: str, place: str) -> str:
    try:
        return check_task_name(text)
    except SpecError as error:
        raise SpecError(f"{place}: {error}") from None
