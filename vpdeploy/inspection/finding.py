"""What one check of a machine or a bundle found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What was looked at, in a word or two.
        status: ``wrong`` keeps something from working; a ``note`` is what is absent, slow or could not be told.
        text: What was found.
        mend: The command that mends it, or what to do; None where there is nothing to.
    """

    subject: str
    status: Status
    text: str
    mend: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {"subject": self.subject, "status": self.status, "text": self.text, "mend": self.mend}


Check = Callable[[], Iterable[Finding]]
"""Looks at one thing. It may raise whatever it likes."""


def run_check(subject: str, check: Check) -> list[Finding]:
    """Return what a check finds; one that fails is a finding itself, for nothing else may be kept from being told."""
    try:
        return list(check())
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [Finding(subject=subject, status="note", text=f"could not be checked ({reason[:300]})")]
