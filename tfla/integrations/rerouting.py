"""Send the calls of an existing Python function elsewhere, under whatever name they are made.

Replacing ``module.f`` reaches only callers that look the name up afterwards. What has been imported
before, into a module, a default argument, a closure or a local variable, is the function object
itself; so its code is exchanged, and the object stays what it was for everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]

_HANDLER = "_rerouted_to"
_DYNAMO = ("_torchdynamo_disable", "_torchdynamo_orig_callable", "_torchdynamo_disable_msg")


class Rerouted:
    """A function whose calls go to a handler until ``restore``.

    ``original`` is a function that does what the rerouted one did. Where torch.compile was told not
    to look into the function (``torch.compiler.disable``), it now looks into the handler. Handler
    and code are set in an order in which a call of another thread meets either the old code or
    both.

    Raises TypeError: `function` is not written in Python.
    """

    def __init__(self, function: Any, handler: Callable[[FunctionType], Handler]) -> None:
        if not isinstance(function, FunctionType):
            raise TypeError(f"function must be a Python function; got {type(function).__name__}.")
        self.function = function
        self.code = function.__code__
        self.keyword_defaults = function.__kwdefaults__
        self.marks = {name: vars(function)[name] for name in _DYNAMO if name in vars(function)}
        self.original = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        self.original.__kwdefaults__ = function.__kwdefaults__
        self.original.__dict__.update(function.__dict__)
        defaults = {**(function.__kwdefaults__ or {}), _HANDLER: handler(self.original)}
        function.__kwdefaults__ = defaults
        function.__code__ = self._forwarding = _forwarding_code(self.code.co_freevars)
        for name in self.marks:
            delattr(function, name)

    def restore(self) -> None:
        """Give the function its code back, unless another has exchanged it since."""
        if self.function.__code__ is not self._forwarding:
            return
        self.function.__code__ = self.code
        self.function.__kwdefaults__ = self.keyword_defaults
        for name, value in self.marks.items():
            setattr(self.function, name, value)


def _forwarding_code(free: tuple[str, ...]) -> CodeType:
    """The code of ``def forward(*args, **kwargs)`` that calls the handler of its keyword defaults.

    A function takes only code with as many free variables as it has cells. So `free` are mentioned,
    where they are never evaluated.
    """
    mention = f"lambda: ({', '.join(free)},)" if free else "None"
    source = (
        f"def outer({', '.join(free)}):\n"
        f"    def forward(*args, {_HANDLER}, **kwargs):\n"
        f"        return {_HANDLER}(args, kwargs)\n"
        f"        {mention}\n"
        f"    return forward\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, __file__, "exec"), namespace)
    code: CodeType = namespace["outer"](*free).__code__
    return code
