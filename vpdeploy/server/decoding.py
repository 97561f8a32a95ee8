"""Decoding off the event loop. Pillow gives up the interpreter lock while it decodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.image import load_pixels
from vpdeploy.server.budget import MemoryBudget
from vpdeploy.server.work import WorkPool
from vpdeploy.serving.queue import Pixels


class Decoder:
    """Turns encoded images into pixels of the backbone's size.

    Args:
        preprocessing: How images are brought to the backbone's input.
        pool: The threads that decode.
        budget: What decoding may hold.
        max_pixels: Images of more pixels are refused.
    """

    def __init__(self, preprocessing: Preprocessing, *, pool: WorkPool, budget: MemoryBudget, max_pixels: int) -> None:
        self._preprocessing = preprocessing
        self._pool = pool
        self._budget = budget
        self._max_pixels = max_pixels

    def submit(
        self, files: Sequence[bytes], *, line: str, client: str, on_decoded: Callable[[float, float], None]
    ) -> list[asyncio.Future[Pixels]]:
        """Start to decode the images of one request, all of them or none.

        Args:
            files: Encoded images.
            line: Whose turn they take.
            client: Whose share of the budget they take.
            on_decoded: Called for each image with the readings of ``time.monotonic`` at which its decoding began and
                ended, in s, on any thread, before its pixels are there.

        Returns:
            The running loop's future pixels, uint8 [H, W, 3] each; they raise InputError for what is no image, and
            QueueFullError where the budget does not hold its pixels now.

        Raises:
            QueueFullError: Too many images wait to be decoded.
        """
        return self._pool.submit_all(line, [partial(self._decode, file, client, on_decoded) for file in files])

    def _decode(self, file: bytes, client: str, on_decoded: Callable[[float, float], None]) -> Pixels:
        started_at = time.monotonic()
        # A reservation of its own: decoding goes on for a moment where the client has left and its request has ended.
        with self._budget.reserve(client) as reservation:
            pixels = load_pixels(file, self._preprocessing, max_pixels=self._max_pixels, admit=reservation.grow)
        on_decoded(started_at, time.monotonic())
        return pixels
