"""Many pictures: decoded in threads, ahead of the batches that they run in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import InputError
from vpdeploy.machine import usable_cores
from vpdeploy.session.prediction import Prediction, rank_classes
from vpdeploy.session.slots import Lease

MAX_PREDICT_BATCH = 32
"""How many pictures run together at most."""

_MOST_DECODERS = 8

_Pixels = npt.NDArray[np.uint8]
_T = TypeVar("_T")


def answer_each(
    items: Iterable[_T],
    read: Callable[[_T], _Pixels],
    lease: Lease,
    run: Callable[[_Pixels, npt.NDArray[np.int32]], npt.NDArray[np.float32]],
    *,
    top: int,
) -> Generator[tuple[_T, Prediction | InputError], None, None]:
    """Classify what an iterator gives, however much that is: two batches of it are held at a time.

    Args:
        items: What stands for a picture; taken in the caller's thread.
        read: Makes pixels of an item, uint8 [H, W, 3] of the backbone's size; called from several threads.
        lease: The right to use the task's slot, held until the iterator ends.
        run: Makes logits, float32 [B, C], of images, uint8 [B, H, W, 3], and slots, int32 [B].
        top: How many classes to name at most.

    Yields:
        Each item in order with its answer, or with the error that ``read`` found in it.
    """
    rest = iter(items)
    waiting: deque[tuple[_T, Future[_Pixels]]] = deque()
    pool = ThreadPoolExecutor(min(usable_cores(), _MOST_DECODERS), thread_name_prefix="vpdeploy-decode")
    try:
        while True:
            # While one batch runs, the next is being decoded.
            wanted = 2 * MAX_PREDICT_BATCH - len(waiting)
            waiting.extend((item, pool.submit(read, item)) for item in islice(rest, wanted))
            if not waiting:
                return
            batch = [waiting.popleft() for _ in range(min(MAX_PREDICT_BATCH, len(waiting)))]

            # A picture that cannot be read takes no row.
            found = [(item, _outcome(future)) for item, future in batch]
            pixels = [each for _, each in found if isinstance(each, np.ndarray)]
            rows: Iterator[npt.NDArray[np.float32]] = iter(())
            if pixels:
                rows = iter(run(np.stack(pixels), np.full(len(pixels), lease.slot, dtype=np.int32)))

            # Classes beyond the task's own are those of others in the table.
            card = lease.card
            for item, each in found:
                if isinstance(each, InputError):
                    yield item, each
                else:
                    yield item, rank_classes(card.name, card.labels, next(rows)[: len(card.labels)], top=top)
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(future: Future[_Pixels]) -> _Pixels | InputError:
    try:
        return future.result()
    except InputError as error:
        return error
