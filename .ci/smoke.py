"""The installed wheel, used from outside the repository."""

import importlib.metadata
import pathlib
import subprocess
import sys

import torch

import tfla

package = pathlib.Path(tfla.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not what the wheel installed"
assert importlib.metadata.version("tfla") == tfla.__version__
assert (package / "py.typed").is_file()
core = [r for r in importlib.metadata.requires("tfla") or [] if "extra ==" not in r]
assert [r.split(">")[0] for r in core] == ["torch"], core

q, k, v = (torch.randn(2, 100, 4, 16, requires_grad=True) for _ in "qkv")
i, f = (torch.randn(2, 100, 4, requires_grad=True) for _ in "if")
h, state = tfla.mlstm(q, k, v, i, f, output_final_state=True)
(h.square().sum() + state.C.sum()).backward()
assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v, i, f))

for command in ([], ["train"], ["generate"], ["demo"]):
    shown = subprocess.run(["tfla", *command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and not shown.stderr, (command, shown)
print(f"tfla {tfla.__version__} from its wheel: the functions and the command work")
