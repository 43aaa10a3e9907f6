"""A recorder for the CPU that does what a CUDA graph does: recording changes nothing, and a replay
computes from whatever lies at the addresses that were recorded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """The operations of torch that are called within it. What they overwrite is put back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            x = given.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(x, Tensor) and x.data_ptr() not in self.before:
                self.before[x.data_ptr()] = (x, x.clone())
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for x, value in self.before.values():
            x.copy_(value)

    @torch.inference_mode()  # in which tensors of either mode may be written to
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            new = tree_leaves(func(*args, **kwargs))
            aliases = [r.alias_info for r in func._schema.returns]
            if any(alias is not None for alias in aliases):
                continue  # a view of what lies where it did, or one of the arguments
            for old, value in zip(tree_leaves(recorded), new, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(value)


class Recorder:
    """In place of ``tfla.integrations.inference.record``; counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(
        self, run: Callable[[], Tensor], device: torch.device
    ) -> tuple[Callable[[], None], Tensor]:
        tape = Tape()
        with tape:
            y = run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, y
