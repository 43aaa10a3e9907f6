"""The private names of Triton that compiling a kernel needs; nothing here needs torch.

Checked with Triton 3.6 to 3.9. Where a name is missing an ImportError says which versions have it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["compile_kernel", "gluon_reinterpret"]


def gluon_reinterpret(descriptor: Any) -> Any:
    """The method that reads shared memory in another type: public in Triton 3.8, private before."""
    found = getattr(descriptor, "reinterpret", None) or getattr(descriptor, "_reinterpret", None)
    if found is None:
        raise ImportError(
            "Triton's Gluon has no shared_memory_descriptor.reinterpret (checked with Triton 3.6 "
            'to 3.9); use backend="reference", or install one of these.'
        )
    return found


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    target: tuple[str, int | str],
    options: dict[str, int],
) -> Any:
    """What ``triton.compile`` makes of a kernel, in Triton's or in Gluon's language. target: a
    backend and an architecture, as ("cuda", 90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    language: Any = ASTSource
    if kernel.is_gluon():
        try:
            from triton.experimental.gluon._runtime import GluonASTSource
        except ImportError as error:
            raise ImportError(
                "Triton's Gluon has no GluonASTSource (checked with Triton 3.6 to 3.9); use "
                'backend="reference", or install one of these.'
            ) from error
        language = GluonASTSource
    source = language(kernel, signature, constants, attributes)
    lanes = 64 if target[0] == "hip" else 32
    return triton.compile(source, target=GPUTarget(*target, lanes), options=options)
