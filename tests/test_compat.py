"""Private names of torch, Triton and the CUDA driver: used in one file alone, and what happens
where one of them is not there."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tfla
from tfla import _compat, _compat_triton

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tfla"
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("_compat"))

# Private names of neither torch nor Triton: of transformers, whose backends are patched there.
ALLOWED = {"os._exit", "_gradient_checkpointing_func", "_train_fn", "_inference_fn"}
TUPLES = {"_asdict", "_fields", "_make", "_replace"}
# Public by name, but what lies behind them changes from one Triton to the next.
INSIDES = ("triton.runtime", "triton.knobs", "triton.compiler", "triton.backends")
OF_KERNELS = {"device_caches", "cache_hook", "pre_run_hooks", "set_allocator"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.AST]) -> set[str]:
    """Private names that the package gives to things of its own."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) in ("self", "cls"):
                names.add(node.attr)
    return {name for name in names if private(name)}


def foreign(tree: ast.AST, own: set[str]) -> list[str]:
    """What a file uses that belongs into _compat.py or _compat_triton.py."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            base = ast.unparse(node.value)
            known = node.attr in own | TUPLES | ALLOWED or text in ALLOWED
            if private(node.attr) and not known and base not in ("self", "cls"):
                found.append(text)
            if text.startswith(INSIDES) or node.attr in OF_KERNELS:
                found.append(text)
            if private(node.attr) and base.split(".")[0] in ("torch", "triton", "dist"):
                found.append(text)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            for name in names:
                if name.split(".")[0] == "ctypes" or name.startswith(INSIDES):
                    found.append(name)
                outside = name.split(".")[0] in ("torch", "triton")
                if outside and any(map(private, name.split("."))):
                    found.append(name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"(torch|triton)(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*", node.value):
                found.append(node.value)  # for importlib and the like
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(str(name.value)):
                if name.value not in own | ALLOWED:
                    found.append(ast.unparse(node))
    return found


TREES = {path: ast.parse(path.read_text()) for path in OTHERS}
OWN = own_names(list(TREES.values()))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stand_in_one_file(path: Path) -> None:
    assert not foreign(TREES[path], OWN)


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._are_functorch_transforms_active()",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "import torch._dynamo",
        "from torch import _C",
        "import triton.runtime.driver",
        "from triton.knobs import runtime",
        "triton.runtime.driver.active.get_current_stream(0)",
        "x.untyped_storage()._cdata",
        "func._schema.name",
        "getattr(torch, '_foreach_copy_')",
        "dist.distributed_c10d._get_default_store()",
        "import ctypes",
        "from ctypes import CDLL",
        "kernel.device_caches[0]",
        "triton.set_allocator(f)",
        "torch._exit",
        "importlib.import_module('torch._dynamo.eval_frame')",
    ],
)
def test_the_walk_sees_every_way_to_a_private_name(line: str) -> None:
    assert foreign(ast.parse(line), OWN)


@pytest.mark.parametrize("line", ["self._x", "os._exit(1)", "state._replace(n=None)", "x.__name__"])
def test_the_walk_lets_other_names_pass(line: str) -> None:
    assert not foreign(ast.parse(line), OWN)


# ---------------------------------------------------------------- names of torch that are not there

# Torch's own code needs some of them to run at all: of these, what _compat.py has found is taken
# away instead.
NAMES = [
    "torch.autograd.forward_ad._current_level",
    "torch.distributed.distributed_c10d._get_default_store",
    "torch.distributed.distributed_c10d._resolve_process_group",
    "torch._foreach_copy_",
]
EAGER = [name for name in NAMES if not name.endswith("_resolve_process_group")]
CALLS = """
import torch, tfla
q, k, v = torch.randn(3, 1, 40, 2, 16, requires_grad=True).unbind(0)
i, f = torch.randn(2, 1, 40, 2)
h, state = tfla.mlstm(q, k, v, i, f, output_final_state=True)
h.sum().backward()
with torch.no_grad():
    again, _ = tfla.mlstm(q, k, v, i, f)
    assert torch.equal(h, again)
    one, _ = tfla.mlstm_step(*(x[:, 0] for x in (q, k, v, i, f)), state)
assert one.isfinite().all()
print("served")
"""


@pytest.mark.parametrize("name", EAGER)
def test_a_missing_name_of_torch_does_not_cost_the_call(name: str) -> None:
    """Missing before tfla is imported."""
    code = f"import torch, torch.distributed, torch.autograd.forward_ad\ndel {name}\n{CALLS}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["served"], done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_goes_while_tfla_is_loaded_does_not_cost_the_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(name)
    exec(CALLS, {})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_derivatives_that_tfla_lacks_are_refused_without_the_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4)

    def call(q: torch.Tensor) -> torch.Tensor:
        return tfla.linear_attention(q, x[1], x[2])[0]

    monkeypatch.setattr(_compat, "forward_ad", SimpleNamespace())
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        with pytest.raises(RuntimeError, match="tfla has no forward-mode derivatives"):
            call(dual)
    monkeypatch.setattr(_compat, "_transforms_active", None)
    assert call(x[0]).isfinite().all()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda q: call(q[None]))(x[0])


@pytest.mark.parametrize("name", ["_foreach_copy_", None])
def test_tensors_are_copied_with_and_without_the_joint_copy(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name:
        monkeypatch.delattr(torch, name)
    targets = [torch.zeros(2), torch.zeros(3, dtype=torch.float64)]
    _compat.copy_each(targets, [torch.ones(2), torch.full((3,), 2.0)])
    assert targets[0].tolist() == [1, 1] and targets[1].tolist() == [2, 2, 2]


def test_a_group_by_name_that_torch_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.distributed_c10d, "_resolve_process_group")
    with pytest.raises(RuntimeError, match="named '7'.*outside of torch.compile"):
        _compat.process_group("7")


def test_hooks_of_a_module_are_found() -> None:
    module = nn.Linear(1, 1)
    assert _compat.pre_forward_hooks(module) == []
    module.register_forward_pre_hook(print)
    assert _compat.pre_forward_hooks(module) == [print]


# ---------------------------------------------------------------- Triton's versions


@pytest.mark.parametrize(
    ("version", "numbers", "checked"),
    [
        ("3.6.0", (3, 6), True),
        ("3.9.1", (3, 9), True),
        ("3.7.1+git1234", (3, 7), True),
        ("3.5.1", (3, 5), False),
        ("3.10.0", (3, 10), False),
        ("4.0.0", (4, 0), False),
        ("unknown", None, False),
        (None, None, False),
    ],
)
def test_versions_of_triton(
    version: str | None, numbers: object, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace() if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", fake)
    for function in ("triton_release", "triton_version"):
        monkeypatch.setattr(_compat, function, inspect.unwrap(getattr(_compat, function)))
    assert _compat.triton_release() == (version or "")
    assert _compat.triton_version() == numbers
    assert _compat.triton_is_checked() == checked


def test_a_gluon_without_the_method_says_which_triton_has_it() -> None:
    with pytest.raises(ImportError, match="Triton 3.6 to 3.9"):
        _compat_triton.gluon_reinterpret(object)


def test_hooks_may_be_chains_functions_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(_compat, "_runtime_settings", lambda: settings)
    assert not _compat.launches_are_watched()
    chain = SimpleNamespace(calls=[])
    for name in ("launch_enter_hook", "launch_exit_hook"):
        monkeypatch.setattr(settings, name, chain)
        assert not _compat.launches_are_watched()
        chain.calls.append(print)
        assert _compat.launches_are_watched()
        chain.calls.clear()
        monkeypatch.setattr(settings, name, print)
        assert _compat.launches_are_watched()
        monkeypatch.setattr(settings, name, None)


def test_importing_the_file_does_not_import_triton() -> None:
    code = "import sys, tfla._compat; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_a_watch_notices_what_has_become_of_a_module() -> None:
    inner = nn.Linear(3, 3)
    model = nn.Sequential(inner, nn.LayerNorm(3))
    watch = _compat.ModuleWatch(list(model.modules()))
    assert watch.unchanged()
    with torch.no_grad():
        inner.weight.mul_(2)  # where it lies
    assert watch.unchanged()
    weight, data = inner.weight, inner.weight.data
    for change, undo in (
        (
            lambda: setattr(inner, "weight", nn.Parameter(data)),
            lambda: setattr(inner, "weight", weight),
        ),
        (lambda: setattr(weight, "data", data.clone()), lambda: setattr(weight, "data", data)),
        (lambda: setattr(model, "0", nn.Linear(3, 3)), lambda: setattr(model, "0", inner)),
        (lambda: model.append(nn.Identity()), lambda: model.pop(-1)),
        (lambda: setattr(inner, "forward", len), lambda: delattr(inner, "forward")),
    ):
        change()
        assert not watch.unchanged()
        undo()
        assert watch.unchanged()
    handle = inner.register_forward_hook(lambda *_: None)
    assert not watch.unchanged()
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not watch.unchanged()
    handle.remove()
    assert watch.unchanged()
    del vars(inner)["_forward_hooks"]  # a torch that calls it something else
    assert not _compat.ModuleWatch([inner]).unchanged()
