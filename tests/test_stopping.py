"""A job is asked to stop by a signal and looks where it loses nothing."""

import signal
import threading

import pytest

from mupgpt.util.stopping import Stop, stop_flag


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_a_second_one_acts(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        with stop_flag() as stop:
            stop.check()
            signal.raise_signal(number)
            assert stop.asked and heard == []
            with pytest.raises(KeyboardInterrupt):
                stop.check()
            signal.raise_signal(number)
            assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number, number]  # afterwards the handler is the one from before
    finally:
        signal.signal(number, before)


def test_another_reason_to_stop():
    reasons = []
    with stop_flag(lambda: bool(reasons)) as stop:
        stop.check()
        reasons.append("the parent is gone")
        assert stop.asked


def test_outside_the_main_thread_only_the_reason_counts():
    seen = []

    def job():
        with stop_flag(lambda: len(seen) > 0) as stop:
            seen.append(stop.asked)
            seen.append(stop.asked)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_asked_stays_asked():
    stop = Stop()
    assert not stop.asked
    stop.ask()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stop.check()
