"""Whether a method can be pruned as asked, and the candidates that follow from it."""

from __future__ import annotations

from dataclasses import replace

from vpdeploy.errors import SpecError
from vpdeploy_train.methods.kept import PrunableMethod
from vpdeploy_train.methods.method import PromptMethod
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.shares import AUTO, Shares


def shares_to_try(settings: TrainSettings, method: PromptMethod) -> list[Shares]:
    """Return the candidates of the search, with whole segments where the method's prompts have none.

    Args:
        settings: What was asked for.
        method: The unpruned prompts.

    Raises:
        SpecError: Something was asked for that the method does not have.
    """
    name = settings.method
    if not isinstance(method, PrunableMethod):
        raise SpecError(f"--prune: method '{name}' has no prompts to prune; use --no-prune")
    shares = settings.keep_ratios()
    if settings.prune_kv and not any(method.kept.kv_tokens):
        raise SpecError(f"--prune-kv: method '{name}' has no key/value prompts here; leave the option away")
    if settings.keep_hidden < 1 and not method.kept.hidden:
        raise SpecError(f"--keep-hidden: method '{name}' has no hidden units; leave the option away")
    if method.segmented:
        return shares
    reason = "are made from the image" if method.form == "adaptive" else "do not enter as they are stored"
    if settings.prune_mode == "zero":
        raise SpecError(
            f"--prune-mode zero: the prompts of method '{name}' {reason} and cannot be stored as zeros; "
            "use --prune-mode remove"
        )
    if settings.keep_segments != AUTO and any(share.segments < 1 for share in shares):
        raise SpecError(
            f"--keep-segments: the prompts of method '{name}' {reason} and have no segments; leave the option away"
        )
    return [replace(share, segments=1.0) for share in shares]
