"""What the tests of the command share; the fixture `call` of conftest.py runs it."""

from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]  # words -> exit status, standard output, standard error
