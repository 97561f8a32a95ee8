"""Finding damaged images before training starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from vpdeploy.errors import InputError
from vpdeploy.image import MAX_PIXELS, decode_image
from vpdeploy_train.data.example import Example

_SHORTER_SIDE: Final = 224  # a whole JPEG is read at any scale; a small one is quicker
_NAMED: Final = 3


def check_images(
    examples: Sequence[Example],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
) -> None:
    """Decode every image file once.

    Args:
        examples: The examples to check, of any split; those that are pixels already are passed over, and a file
            that occurs twice is decoded once.
        on_progress: Called in this thread with the number of files checked and of all files.
        max_pixels: Refuse images of more pixels.
        threads: Number of decoding threads; by default one for each CPU.

    Raises:
        InputError: Images cannot be decoded; the message counts them all and names the first three.
    """
    files = list(dict.fromkeys(example.source for example in examples if isinstance(example.source, Path)))
    faults: list[str] = []

    def find_fault(file: Path) -> str | None:
        try:
            decode_image(file, shorter_side=_SHORTER_SIDE, max_pixels=max_pixels)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for done, fault in enumerate(pool.map(find_fault, files), start=1):
            if fault is not None:
                faults.append(fault)
            if on_progress is not None:
                on_progress(done, len(files))
    if faults:
        others = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise InputError(
            f"{len(faults)} of {len(files)} images cannot be used: replace or remove them: "
            f"{'; '.join(faults[:_NAMED])}{others}"
        )
