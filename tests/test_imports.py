"""The package keeps its shape: imports point down, the core needs torch alone."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tfla"

# From the top. A unit may import itself and what stands in a line below its own; the units of one
# line do not know each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench", "demo", "environment", "integrations", "jax"},
    {"render"},
    {"threads"},
    {"nn", "selftest", "xlstm"},
    {"linear"},
    {"tfla"},  # the package itself: its public face
    {"api"},
    {"dispatch"},
    {"checks", "parallel"},
    {"ops", "programs", "verdicts"},
    {"algorithm"},
    {"log"},
    {"reference", "kernels"},
    {"backend", "shapes"},
    {"dtypes", "gates"},
    {"spec"},
    {"errors", "offsets", "plan", "signals"},
    {"_compat", "_compat_triton", "limits"},
]
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
# What needs no torch: that is for who has JAX. Of kernels/ all but what works on tensors; functions
# may import torch where they are given tensors.
WITHOUT_TORCH = {
    *("_compat_triton", "algorithm", "backend", "errors", "jax", "kernels", "limits", "log"),
    *("offsets", "plan", "programs", "spec"),
}
ON_TENSORS = {"kernels/decode.py", "kernels/pointwise.py", "kernels/runtime.py"}
NEEDED_BY_JAX = {"jax", "jaxlib", "numpy"}
CORE = {unit for units in LAYERS[LAYERS.index({"tfla"}) :] for unit in units}
# What reads every format of weights, tfla.xlstm.load, calls the reader of transformers' one.
UPWARD = {"xlstm/writer.py": {"integrations"}}
# The kernels are written in Triton; checks asks whether it is there, to say so when it is not.
BESIDE_TORCH = {
    "kernels": {"triton"},
    "checks": {"triton"},
    "_compat": {"triton"},
    "_compat_triton": {"triton"},
}

FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The unit a file belongs to: the name right below the package."""
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "tfla" if top == "__init__" else top


def imported(source: str, package: str) -> Iterator[str]:
    """Full names of all that a source imports, wherever in it; `from tfla import x` is tfla.x."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = (
                package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            )
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"tfla(\.\w+)+", str(node.value)):
            yield str(node.value)  # for importlib


def units_imported(source: str, package: str = "tfla") -> set[str]:
    """The units of this package that a source imports."""
    units = set()
    for name in imported(source, package):
        if name.split(".")[0] == "tfla":
            below = (name.split(".") + ["tfla"])[1]
            is_unit = (PACKAGE / below).is_dir() or (PACKAGE / f"{below}.py").is_file()
            units.add(below if below in RANK or is_unit else "tfla")
    return units


def others_imported(source: str) -> set[str]:
    """What a source imports that is neither in this package nor in the standard library."""
    roots = {name.split(".")[0] for name in imported(source, "tfla") if name}
    return roots - sys.stdlib_module_names - {"tfla"}


def at_import(module: ast.Module) -> ast.Module:
    """What of a module runs, or is named, when it is imported."""
    kept = [
        node
        for node in module.body
        if not isinstance(node, ast.FunctionDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(kept, [])


def upward(unit: str, used: set[str]) -> set[str]:
    """The units that may not be imported by this one."""
    return {other for other in used if other != unit and RANK[other] <= RANK[unit]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    used = units_imported(path.read_text(), package)
    assert {unit, *used} <= RANK.keys(), "a new unit: give it its place in LAYERS"
    assert not upward(unit, used) - UPWARD.get(path.relative_to(PACKAGE).as_posix(), set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_packages_are_imported_where_they_belong(path: Path) -> None:
    others = others_imported(path.read_text())
    unit = unit_of(path)
    if unit in WITHOUT_TORCH and path.relative_to(PACKAGE).as_posix() not in ON_TENSORS:
        source = ast.unparse(at_import(ast.parse(path.read_text())))
        others = others_imported(source)
        used = units_imported(source, ".".join(path.relative_to(ROOT).parts[:-1]))
        allowed = NEEDED_BY_JAX if unit == "jax" else BESIDE_TORCH.get(unit, set())
        assert used - {"reference"} <= WITHOUT_TORCH and others <= allowed
    elif unit in CORE:
        assert others <= {"torch"} | BESIDE_TORCH.get(unit, set())
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        lines = [line for name, extra in extras.items() if name != "dev" for line in extra]
        declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
        renamed = {"flash_linear_attention": "fla"}
        assert others <= {"torch", *(renamed.get(name, name) for name in declared)}


def test_the_walk_sees_every_form_of_import() -> None:
    source = """
import tfla.cli
from tfla import bench, mlstm
from .xlstm import model
from . import nn
def late():
    from tfla.kernels import scan
    import rich.table
    importlib.import_module("tfla.plan")
"""
    used = units_imported(source)
    assert used == {"cli", "bench", "tfla", "xlstm", "nn", "kernels", "plan"}
    assert upward("kernels", used) == {"cli", "bench", "tfla", "xlstm", "nn"}
    assert upward("kernels", {"reference"}) == {"reference"}
    assert upward("cli", used) == set()
    assert units_imported("from ..api import mlstm\nfrom . import model", "tfla.xlstm") == {
        "api",
        "xlstm",
    }
    assert others_imported(source) == {"rich"}


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_nothing_but_torch() -> None:
    """What torch itself loads is its own affair (NumPy, where it is installed)."""
    code = """
import sys, torch
before = set(sys.modules)
import tfla
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(" ".join(sorted(new - sys.stdlib_module_names)))
print("triton" in sys.modules)
"""
    assert run(code).splitlines() == ["tfla", "False"]


# A module that is there for its name alone: the public names must come whatever is imported first.
FIRST = ["tfla.gates", "tfla.api", "tfla.nn", "tfla.integrations", "tfla.cli"]


@pytest.mark.parametrize("first", ["tfla", *FIRST])
def test_the_public_names_come_with_torch_or_when_they_are_asked_for(first: str) -> None:
    code = f"""
import sys, {first}
import tfla
print("torch" in sys.modules)
assert set(tfla.__all__) <= set(dir(tfla))
from tfla import State, mlstm
assert tfla.mlstm is mlstm and tfla.State is State and callable(tfla.supports)
assert all(name in vars(tfla) for name in tfla.__all__)
try:
    tfla.nothing
except AttributeError as error:
    print(error)
"""
    asked, error = run(code).splitlines()
    assert asked == str(first not in ("tfla", "tfla.cli"))
    assert error == "module 'tfla' has no attribute 'nothing'"


@pytest.mark.parametrize("order", ["tfla, torch", "torch, tfla"])
def test_torch_knows_of_tfla_whichever_is_imported_first(order: str) -> None:
    """An exported program names the operators, and a saved State its type: neither asks for a name
    of tfla."""
    code = f"""
import io, sys, {order}
print(all(name in vars(tfla) for name in tfla.__all__), type(torch.__spec__.loader).__name__)
print(torch.ops.tfla.forward, tfla.State in torch.serialization.get_safe_globals())
print(any(type(finder).__module__ == "tfla" for finder in sys.meta_path))
"""
    assert run(code).split() == [*"True SourceFileLoader tfla.forward True False".split()]


def test_without_torch_its_functions_say_what_they_need() -> None:
    code = """
import sys
sys.modules["torch"] = None
import tfla, tfla.limits, tfla.offsets
try:
    tfla.mlstm
except ImportError as error:
    print(error)
"""
    assert "tfla.mlstm needs PyTorch" in run(code) and "pip install torch" in run(code)


def test_the_core_works_with_every_optional_package_missing() -> None:
    code = """
import sys
for name in "typer click rich matplotlib safetensors tokenizers transformers triton".split():
    sys.modules[name] = None  # importing it raises ImportError
import torch, tfla
q, k, v = torch.randn(3, 1, 5, 2, 8, requires_grad=True)
i, f = torch.randn(2, 1, 5, 2)
h, state = tfla.mlstm(q, k, v, i, f, output_final_state=True)
h.sum().backward()
step, _ = tfla.mlstm_step(*(x[:, 0].detach() for x in (q, k, v, i, f)), state.detach())
print(h.isfinite().all().item(), step.isfinite().all().item())
"""
    assert run(code).split() == ["True", "True"]
