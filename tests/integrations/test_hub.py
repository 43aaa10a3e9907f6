"""``tfla.integrations.hub``: a folder that the package kernels loads."""

import importlib
import importlib.metadata
import inspect
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tfla
from tfla.integrations.hub import assemble

VARIANT = "build/torch-universal"

# A path with torch on it, and without what makes an editable tfla importable, a .pth file.
ALONE = """
import importlib.util, sys
sys.path = [p for p in sys.path if "site-packages" not in p] + [{site!r}]
assert importlib.util.find_spec("tfla") is None
spec = importlib.util.spec_from_file_location("hub", {init!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import tfla, torch
print(tfla.__file__)
q, k, v = torch.randn(3, 1, 5, 2, 4).unbind(0)
i = f_ = torch.zeros(1, 5, 2)
print(*(tuple(f(q, k, v, i, f_)[0].shape) for f in (module.mlstm, module.layers.mlstm())))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("hub") / "tfla")


def test_it_is_pure_python_and_says_what_it_is(hub: Path) -> None:
    files = [path for path in hub.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".py", ".json", ".typed", ".txt"}
    assert not [path for path in files if "__pycache__" in path.parts]
    metadata = json.loads((hub / VARIANT / "metadata.json").read_text())
    assert (metadata["name"], metadata["license"]) == ("tfla", "Apache-2.0")
    assert tfla.__version__.replace(".", "_") in metadata["id"]


def test_without_tfla_it_brings_its_own(hub: Path) -> None:
    site = sysconfig.get_path("purelib")
    if (Path(site) / "tfla").is_dir():
        pytest.skip("tfla lies beside torch here, not as an editable installation")
    program = ALONE.format(site=site, init=str(hub / VARIANT / "__init__.py"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=hub
    )
    assert done.returncode == 0, done.stderr
    where, shapes = done.stdout.splitlines()
    assert Path(where).is_relative_to(hub)
    assert shapes == "(1, 5, 2, 4) (1, 5, 2, 4)"


def test_a_folder_in_use_is_left_alone(hub: Path) -> None:
    with pytest.raises(FileExistsError, match="not an empty folder"):
        assemble(hub)


def test_make_hub_calls_it(root: Path) -> None:
    done = subprocess.run(["make", "-n", "hub"], cwd=root, capture_output=True, text=True)
    assert "-m tfla.integrations.hub build/hub" in done.stdout, done.stderr


# ------------------------------------------------------------------------------- with kernels


@pytest.fixture(scope="module")
def kernels() -> Any:
    # Not importorskip: without the package, that name is the folder tests/kernels.
    if not any(found.name == "kernels" for found in importlib.metadata.distributions()):
        pytest.skip("needs kernels, of the extra peers")
    return importlib.import_module("kernels")


@pytest.mark.peers
def test_kernels_loads_it_from_a_path(hub: Path, kernels: Any) -> None:
    loaded = kernels.get_local_kernel(hub)
    assert loaded.mlstm is tfla.mlstm and loaded.State is tfla.State
    for name in ("mlstm", "mlstm_step", "linear_attention"):
        layer, function = getattr(loaded.layers, name), getattr(tfla, name)
        wanted = list(inspect.signature(function).parameters.values())
        assert list(inspect.signature(layer.forward).parameters.values())[1:] == wanted


@pytest.mark.peers
def test_a_users_mapping_finds_it(hub: Path, kernels: Any) -> None:
    """A function of a model of the user's, under a name; tfla takes its place and trains."""
    seen = []

    class Slow(nn.Module):
        pass

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return tfla.mlstm(*args, **kwargs, backend="reference")

    mine = list(inspect.signature(tfla.mlstm).parameters.values())
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([own, *mine])  # type: ignore[attr-defined]
    Slow.forward = forward  # type: ignore[assignment]
    Slow = kernels.use_kernel_forward_from_hub("mLSTM")(Slow)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Slow()

        def forward(self, *x: Tensor) -> Tensor:
            return self.cell(*x)[0]

    model = Model()
    q, k, v = torch.randn(3, 1, 5, 2, 4).unbind(0)
    i = f = torch.zeros(1, 5, 2)
    wanted = model(q, k, v, i, f)
    assert seen
    mapping = {"mLSTM": {"cpu": kernels.LocalLayerRepository(hub, layer_name="mlstm")}}
    with kernels.use_kernel_mapping(mapping):
        model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    seen.clear()
    v.requires_grad_()
    y = model(q, k, v, i, f)
    y.sum().backward()
    assert not seen and v.grad is not None
    assert torch.equal(y, wanted)
