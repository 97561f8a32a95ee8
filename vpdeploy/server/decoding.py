"""Decoding off the event loop: a bounded pool of threads. Pillow gives up the interpreter lock while it decodes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from vpdeploy.errors import QueueFullError
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.image import load_pixels
from vpdeploy.serving.queue import Pixels


class Decoder:
    """Turns encoded images into pixels of the backbone's size.

    Args:
        preprocessing: How images are brought to the backbone's input.
        threads: How many images are decoded at a time.
        max_pending: Images that may wait for a thread; more are refused.
        max_pixels: Images of more pixels are refused.
    """

    def __init__(self, preprocessing: Preprocessing, *, threads: int, max_pending: int, max_pixels: int) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="vpdeploy-decode")
        self._preprocessing = preprocessing
        self._max_pending = max_pending
        self._max_pixels = max_pixels
        self._pending = 0
        self._lock = threading.Lock()

    def submit(self, files: Sequence[bytes]) -> list[Future[Pixels]]:
        """Start to decode the images of one request, all of them or none.

        Returns:
            Future pixels, uint8 [H, W, 3] each; they raise InputError for what is no image.

        Raises:
            QueueFullError: Too many images wait to be decoded.
        """
        with self._lock:
            if self._pending + len(files) > self._max_pending:
                raise QueueFullError(
                    f"{self._pending} images wait to be decoded and at most {self._max_pending} may; try again later"
                )
            self._pending += len(files)
        futures = [self.pool.submit(self._decode, file) for file in files]
        for future in futures:
            future.add_done_callback(self._finish)
        return futures

    def close(self) -> None:
        """Finish what was accepted and stop the threads."""
        self.pool.shutdown()

    def _decode(self, file: bytes) -> Pixels:
        return load_pixels(file, self._preprocessing, max_pixels=self._max_pixels)

    def _finish(self, future: Future[Pixels]) -> None:
        with self._lock:
            self._pending -= 1
