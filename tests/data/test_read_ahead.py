"""Read-ahead: the same items and errors, one ahead, and a thread that ends."""

import gc
import threading
import time
import weakref

import pytest
import torch

from craft_ds.data.read_ahead import Counted, read_ahead

CPU = torch.device("cpu")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def wait_until(true) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    gc.collect()
    wait_until(lambda: not threads())


def test_items_and_their_order_stay():
    assert list(read_ahead(iter(range(50)), CPU)) == list(range(50))
    assert list(read_ahead(iter([]), CPU)) == []


def test_it_reads_one_item_ahead_in_its_own_thread():
    started: list[int] = []

    def items():
        for number in range(10):
            assert threading.current_thread() in threads()
            started.append(number)
            yield number

    ahead = read_ahead(items(), CPU)
    assert not started
    for number in range(10):
        assert next(ahead) == number
        wait_until(lambda due=number: len(started) == min(due + 2, 10))
        time.sleep(0.01)
        assert len(started) == min(number + 2, 10)


def test_an_error_is_raised_where_its_item_is_due():
    error = ValueError("the third")

    def items():
        yield 1
        yield 2
        raise error

    ahead = read_ahead(items(), CPU)
    assert next(ahead) == 1
    time.sleep(0.02)
    assert next(ahead) == 2
    time.sleep(0.02)
    with pytest.raises(ValueError, match="the third") as raised:
        next(ahead)
    assert raised.value is error
    with pytest.raises(StopIteration):
        next(ahead)


@pytest.mark.parametrize("end", ["closed", "collected", "interrupted"])
def test_the_thread_ends_with_its_item(end):
    may_end, begun = threading.Event(), threading.Event()
    read: list[int] = []

    def items():
        yield 0
        for number in range(1, 9):
            begun.set()
            may_end.wait(10)
            read.append(number)
            yield number

    ahead = read_ahead(items(), CPU)
    next(ahead)
    assert begun.wait(10)
    if end == "closed":
        ahead.close()
    elif end == "collected":
        del ahead
    else:
        with pytest.raises(KeyboardInterrupt):
            ahead.throw(KeyboardInterrupt)
    assert len(threads()) == 1  # nobody has waited for the item in work
    may_end.set()
    wait_until(lambda: not threads())
    assert read == [1]


def test_an_error_keeps_nothing_alive_without_the_collector():
    class KeptError(Exception):
        pass

    def items():
        yield 1
        raise KeptError

    ahead = read_ahead(items(), CPU)
    next(ahead)
    gc.disable()
    try:
        try:
            next(ahead)
        except KeptError as error:
            kept = weakref.ref(error)
        wait_until(lambda: kept() is None)
    finally:
        gc.enable()


def test_a_counted_iterator_has_its_length():
    counted = Counted(3, iter("abc"))
    assert len(counted) == 3
    assert list(counted) == ["a", "b", "c"]
