"""SIGTERM, SIGINT and SIGHUP: a command cleans up behind itself, and training saves first.

Whoever is ended by one of them leaves with 128 + its number, as a shell would say: 143, 130, 129.
A signal that the process was started to ignore (`nohup tfla train ... &`) stays ignored.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

INTERRUPT = int(signal.SIGINT)  # ctrl-C
NAMES = ("SIGTERM", "SIGINT", "SIGHUP")  # Windows has no SIGHUP


class Interrupted(BaseException):
    """A signal asks this process to end; `number` is the signal's. It is no KeyboardInterrupt,
    which typer and others take for ctrl-C, and so forget which signal it was."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status(error: BaseException) -> int:
    """The status to leave with."""
    return 128 + getattr(error, "number", signal.SIGINT)


def end_silently() -> None:
    """Let ctrl-C end a process that is still importing, before any Signals, as it ends any other:
    without a traceback through the imports."""
    with suppress(ValueError):  # another thread than the main one
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def look() -> None:
    """Raise Interrupted again when some library has swallowed it: the first import of torch, for
    one, has places that catch whatever is raised."""
    for number in (getattr(signal, name, None) for name in NAMES):
        owner = getattr(signal.getsignal(number), "__self__", None) if number else None
        if isinstance(owner, Signals) and owner.noted and not owner._held:
            raise Interrupted(owner.noted)


class Signals:
    """Within `with Signals() as signals:` each of the signals raises Interrupted.

    Within `with signals.held():` the first one is only noted, in `signals.noted`, so that what must
    not be torn comes to its end; a second SIGINT, of somebody who does not want to wait, raises.
    Only the main thread of a process can do any of this; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.noted = 0
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        look()
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in NAMES):
                # None: a handler that was not set from Python, which nobody could put back.
                if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.noted != 0
        self.noted = self.noted or number
        if not self._held or (again and number == signal.SIGINT):
            raise Interrupted(number)
