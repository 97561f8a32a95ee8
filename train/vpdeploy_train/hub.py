"""The Hugging Face hub: whether it can be reached, asked once and briefly, for its own client asks for a minute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Final, Literal

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

_SECONDS: Final = 5.0
"""How long one answer may take, unless HF_HUB_ETAG_TIMEOUT says otherwise."""


def why_unreachable(repository: str, file: str, *, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return why the hub cannot be asked for a file, or None where it answers, be it with a refusal.

    It is one request of the hub's own client, which honours HF_ENDPOINT, HF_HUB_OFFLINE and the variables of proxies.

    Args:
        repository: The repository, such as ``timm/vit_base_patch16_224.mae``.
        file: A file in it.
        kind: What the repository holds.
    """
    constants: Any = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _SECONDS
    url = huggingface_hub.hf_hub_url(repository, file, repo_type=kind)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=seconds)
    except HfHubHTTPError:
        return None  # an answer; what it means is the client's to say
    except Exception as error:  # of whatever library the client makes its requests with
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{constants.ENDPOINT} cannot be reached: {words}"
    return None


def is_cached(repository: str, *files: str, revision: str | None = None) -> bool:
    """Tell whether one of some files of a repository of models lies in the local cache."""
    return any(
        isinstance(huggingface_hub.try_to_load_from_cache(repository, file, revision=revision), str) for file in files
    )


def cache_place() -> str:
    """Return the folder of the local cache."""
    constants: Any = huggingface_hub.constants
    return str(constants.HF_HUB_CACHE)


@contextlib.contextmanager
def without_the_hub() -> Iterator[None]:
    """Let the hub's client look into its cache alone in the block."""
    constants: Any = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
