"""Tiled Flash Linear Attention, the mLSTM and the linear-attention family from one scan.

The functions here take tensors of PyTorch; those for JAX are in ``tfla.jax``, with the same names.
"""

import importlib.util
import signal
import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from pathlib import PurePath
from types import ModuleType
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


def _import_functions() -> None:
    """Import the public names. That also tells torch of tfla: of its operators, which exported
    programs name, and that ``torch.load`` may trust a State."""
    from tfla import api, dispatch

    for name in set(__all__) - {"__version__"}:
        globals()[name] = getattr(dispatch if name == "supports" else api, name)


class _AfterTorch(MetaPathFinder):
    """Calls ``_import_functions`` behind the import of torch, if that comes after the one of tfla,
    unless it is a file of tfla that imports torch, and goes on to import the rest itself."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        begun = {module.split(".")[1] for module in sys.modules if module.startswith("tfla.")}
        if spec is not None and begun <= _WITHOUT_TORCH:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_import(module: ModuleType) -> None:
                del loader.exec_module  # of this one loader, in front of its class's own
                execute(module)
                _import_functions()

            with suppress(AttributeError):  # a loader of another make: when they are asked for
                loader.exec_module = execute_and_import
        return spec


_WITHOUT_TORCH = {
    *("_compat_triton", "algorithm", "backend", "errors", "jax", "kernels", "limits", "log"),
    *("offsets", "plan", "programs", "spec"),
}

# Torch takes a second to import, which the command's help does not wait for, and who uses tfla.jax
# may have no torch. So the public names are imported with torch, or when they are first asked for.
if TYPE_CHECKING:
    from tfla.api import State, linear_attention, mlstm, mlstm_step
    from tfla.dispatch import supports
elif sys.modules.get("torch") is not None:
    _import_functions()
else:
    sys.meta_path.insert(0, _AfterTorch())

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            _import_functions()
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                f"tfla.{name} needs PyTorch, which is not installed: pip install torch. The "
                "functions for JAX are in tfla.jax."
            ) from error
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
