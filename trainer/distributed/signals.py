"""Signals that ask a run to stop: they set a flag, on which the ranks agree at a step boundary."""

from __future__ import annotations

import signal
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # the last: its terminal has closed
HELD_BACK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # while the command line imports, so that none is lost


class StopSignals:
    """Handlers that only set a flag, from the very start on."""

    def __init__(self) -> None:
        self.received = ""
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # by nohup: to go on
                continue
            self._handlers[number] = signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":  # a second Ctrl-C means it
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
