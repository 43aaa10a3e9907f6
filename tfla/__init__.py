"""Tiled Flash Linear Attention, the mLSTM and the linear-attention family from one scan."""

import signal
import sys
from contextlib import suppress
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["State", "__version__", "linear_attention", "mlstm", "mlstm_step", "supports"]


def _is_command() -> bool:
    """Does this process run `tfla` or `python -m tfla`?"""
    if sys.argv[:1] == ["-m"]:  # what Python puts there while it looks for the module to run
        at = sys.orig_argv.index("-m") if "-m" in sys.orig_argv else len(sys.orig_argv)
        return sys.orig_argv[at + 1 : at + 2] == [__name__]
    return PurePath(*sys.argv[:1]).stem == __name__


if _is_command():
    # ctrl-C while the imports of the command run, before tfla.signals can see to it, ends the
    # process as it ends any other, without a traceback through them.
    with suppress(ValueError):  # another thread than the main one
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

# The command's help comes without torch, whose import takes a second: there the public names are
# imported when they are first asked for. A program that imports tfla has them, and the operators
# registered with torch, at once.
if TYPE_CHECKING or not _is_command():
    from tfla.api import State, linear_attention, mlstm, mlstm_step
    from tfla.dispatch import supports
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from tfla import api, dispatch

        value = globals()[name] = getattr(dispatch if name == "supports" else api, name)
        return value
