"""Who may do what: the scopes and tasks that a token grants. Every protocol asks here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from vpdeploy.format.task import split_reference
from vpdeploy.server.statuses import ForbiddenError, UnauthorizedError


class Scope(str, Enum):
    """What a token is good for."""

    INFER = "infer"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What a request may do.

    Attributes:
        name: Who asks, for the log; empty where nobody is asked for a token.
        scopes: What the token is good for.
        tasks: The tasks that exist for it; None for all.
    """

    name: str = ""
    scopes: frozenset[Scope]
    tasks: frozenset[str] | None = None

    def require(self, *scopes: Scope) -> None:
        """Check that the token has one of the scopes.

        Raises:
            ForbiddenError: It has none of them.
        """
        if not self.scopes.intersection(scopes):
            raise ForbiddenError(
                f"this needs the scope {' or '.join(scope.value for scope in scopes)}, the token has "
                f"{', '.join(sorted(scope.value for scope in self.scopes))}; send another token"
            )

    def covers(self, task: str) -> bool:
        """Tell whether a task exists for this token, whichever version of it is meant."""
        return self.tasks is None or split_reference(task)[0] in self.tasks

    def covered(self, tasks: Sequence[str]) -> list[str]:
        """Return those of the tasks that exist for this token."""
        return [task for task in tasks if self.covers(task)]


USER_SCOPES = frozenset((Scope.INFER, Scope.METRICS))
"""What the single token is good for, and everybody where no token is asked for: all but changing what is served."""

EVERY_SCOPE = frozenset(Scope)
"""What the admin token is good for."""

EVERYBODY = Grant(scopes=USER_SCOPES)


def token_digest(token: bytes) -> bytes:
    """Return the sha256 of a token, by which it is known."""
    return hashlib.sha256(token).digest()


class TokenSource(Protocol):
    """Tokens that may change while the server runs."""

    def grants(self) -> Mapping[bytes, Grant]:
        """Return what each token grants now, by its digest."""
        ...


class Access:
    """Tells what a request may do, by its token. Any thread may ask.

    Args:
        tokens: What tokens grant, by their digests.
        source: More tokens, which may change; None where there are none. Without either, nobody is asked for a token.
    """

    def __init__(self, tokens: Mapping[bytes, Grant], source: TokenSource | None = None) -> None:
        self._tokens = dict(tokens)
        self._source = source

    @property
    def is_open(self) -> bool:
        """Whether nobody is asked for a token."""
        return not self._tokens and self._source is None

    def has_scope(self, scope: Scope) -> bool:
        """Tell whether some token is good for a scope now."""
        grants = [*self._tokens.values(), *(self._source.grants().values() if self._source is not None else ())]
        return any(scope in grant.scopes for grant in grants)

    def grant(self, authorization: bytes) -> Grant:
        """Return what a request may do.

        Args:
            authorization: The value of its header ``Authorization``; empty where it has none.

        Raises:
            UnauthorizedError: The token is missing or unknown.
        """
        if self.is_open:
            return EVERYBODY
        scheme, _, token = authorization.partition(b" ")
        # The scheme's case is free (RFC 9110, 11.1).
        if scheme.lower() == b"bearer" and token:
            digest = token_digest(token)
            # A look-up by digest tells by its time nothing of use: nobody can choose a digest's first bytes.
            for known in (self._tokens, self._source.grants() if self._source is not None else {}):
                if digest in known:
                    return known[digest]
        raise UnauthorizedError("send the header 'Authorization: Bearer TOKEN'")
