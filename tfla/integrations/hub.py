"""A folder that the package ``kernels`` of Hugging Face loads: tfla as a universal kernel.

    python -m tfla.integrations.hub build/hub        (make hub)

    build/hub/build/torch-universal/metadata.json    what kernels reads first
                                    __init__.py      the public functions, and `layers` of them
                                    tfla/            this package, as it is

It is pure Python; on a GPU the Triton kernels compile where it runs. tfla has operators, of which a
process can hold one version, so where tfla is installed the folder hands on that one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import tfla
from tfla.xlstm.files import atomic_folder

VARIANT = "torch-universal"

_INIT = '''"""tfla as a kernel of the Hugging Face hub: functions, and the same as layers."""

import importlib.util
import sys
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType, SimpleNamespace

from torch import nn


def _tfla() -> ModuleType:
    """The tfla that is installed or loaded already, else the one beside this file."""
    if "tfla" not in sys.modules and importlib.util.find_spec("tfla") is None:
        folder = Path(__file__).parent / "tfla"
        spec = importlib.util.spec_from_file_location(
            "tfla", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["tfla"] = module
        spec.loader.exec_module(module)
    return importlib.import_module("tfla")


def _layer(function):
    """The function as a layer without a state, which a mapping may put in place of another."""

    class Layer(nn.Module):
        can_torch_compile = True
        has_backward = True

        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    made = signature(function)
    first = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    Layer.forward.__signature__ = made.replace(parameters=[first, *made.parameters.values()])
    Layer.__name__ = Layer.__qualname__ = function.__name__
    return Layer


_package = _tfla()
State = _package.State
mlstm = _package.mlstm
mlstm_step = _package.mlstm_step
linear_attention = _package.linear_attention
layers = SimpleNamespace(**{f.__name__: _layer(f) for f in (mlstm, mlstm_step, linear_attention)})

__all__ = ["State", "layers", "linear_attention", "mlstm", "mlstm_step"]
'''


def assemble(path: str | Path) -> Path:
    """Write a folder that the package ``kernels`` loads; it appears whole or not at all.

    Args:
        path: the folder; it must be empty or not exist.

    Returns:
        The folder.

    Raises:
        FileExistsError: `path` is a file, or a folder that is not empty.

    Example:
        >>> from tfla.integrations.hub import assemble
        >>> folder = assemble("build/hub")                           # doctest: +SKIP
        >>> from kernels import get_local_kernel                     # doctest: +SKIP
        >>> mlstm = get_local_kernel(folder).mlstm                   # doctest: +SKIP
    """
    folder, package = Path(path), Path(tfla.__file__).parent
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder; name another or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        variant = temporary / "build" / VARIANT
        variant.mkdir(parents=True)
        shutil.copytree(
            package, variant / "tfla", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
        (variant / "__init__.py").write_text(_INIT, "utf-8")
        (variant / "metadata.json").write_text(json.dumps(_metadata(), indent=2) + "\n", "utf-8")
    return folder


def _metadata() -> dict[str, object]:
    """In the words of kernels 0.17. Its versions are whole numbers, counted from 1."""
    return {
        "id": f"tfla_{tfla.__version__.replace('.', '_')}",
        "name": "tfla",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},  # kernels has no word for any; the variant says universal
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tfla.integrations.hub FOLDER")
    print(assemble(sys.argv[1]))
