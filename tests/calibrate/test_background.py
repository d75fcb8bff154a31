"""Work beside the main thread: in order, one after the other, and no error is lost."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from calibrate.background import Background

CPU = torch.device("cpu")


def fail() -> None:
    raise ValueError("planted")


def test_work_is_done_in_order_in_another_thread_and_all_of_it_at_the_end() -> None:
    done: list[tuple[int, bool]] = []

    def work(number: int) -> None:
        time.sleep(0.01 * (5 - number))
        done.append((number, threading.current_thread() is threading.main_thread()))

    with Background(CPU) as background:
        for number in range(5):
            background.submit(lambda number=number: work(number))
    assert done == [(number, False) for number in range(5)]


def test_an_error_comes_out_of_a_later_call() -> None:
    with pytest.raises(ValueError, match="planted"), Background(CPU) as background:  # noqa: PT012
        background.submit(fail)
        for _ in range(3):
            background.submit(lambda: None)
        pytest.fail("the error came too late")


def test_an_error_of_the_last_work_comes_out_at_the_end() -> None:
    with pytest.raises(ValueError, match="planted"), Background(CPU) as background:
        background.submit(fail)


def test_after_an_error_outside_nothing_more_is_begun() -> None:
    begun, go = [], threading.Event()
    with pytest.raises(KeyError), Background(CPU) as background:  # noqa: PT012
        background.submit(go.wait)
        background.submit(lambda: begun.append(1))
        threading.Timer(0.2, go.set).start()
        raise KeyError
    assert not begun
