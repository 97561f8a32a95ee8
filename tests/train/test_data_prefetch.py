import threading

import pytest

from vpdeploy_train.data.prefetch import prefetched


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "vpdeploy-prefetch"]


def test_items_keep_their_order_and_the_thread_ends():
    with prefetched(iter(range(20))) as items:
        assert list(items) == list(range(20))
    assert not threads()


def test_items_are_drawn_ahead_in_another_thread():
    ready = threading.Event()
    drawn = []

    def numbers():
        for number in range(3):
            drawn.append((number, threading.current_thread().name))
            if number == 1:
                ready.set()
            yield number

    with prefetched(numbers()) as items:
        assert ready.wait(10)  # two are drawn before one is asked for
        assert list(items) == [0, 1, 2]
    assert drawn == [(number, "vpdeploy-prefetch") for number in range(3)]


def test_no_more_than_the_depth_and_the_one_in_hand_are_drawn():
    drawn = []

    def numbers():
        for number in range(100):
            drawn.append(number)
            yield number

    with prefetched(numbers(), depth=2) as items:
        next(items)
    assert len(drawn) <= 4


def test_an_error_arrives_in_its_place():
    def numbers():
        yield 1
        raise ValueError("broken")

    with prefetched(numbers()) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="broken"):
            next(items)
    assert not threads()


def test_leaving_early_ends_the_thread():
    with prefetched(iter(range(1000)), depth=1) as items:
        next(items)
    assert not threads()
