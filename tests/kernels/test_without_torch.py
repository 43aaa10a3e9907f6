"""Programs are made, and their kernels compiled, where there is no torch: that is for JAX."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

CODE = """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
import numpy as np
from tfla.kernels.compile import compiled, source_of_launch
from tfla.plan import Device
from tfla.programs import programs
from tfla.spec import CallSpec

half, full, device = np.dtype("float16"), np.dtype("float32"), Device((9, 0), 132, 232448)
names = set()
for packed in (False, True):
    for gate, normalize in (("exp", True), ("sigmoid", False)):
        spec = CallSpec(
            B=1, T=2048, H=8, G=1 if packed else 8, K=128, V=256, N=3 if packed else 1,
            packed=packed, dtype=half, gate_dtypes=(full, full), device=device,
            initial_state=True, scale=0.1,
            input_gate=gate, sigmoid_f=True, normalize=normalize, final_state=True,
            needs_grad=True, backend="triton", precision="ieee",
        )
        for program in programs(spec, device):
            names |= {x.kernel.__name__ for x in program.launches}
            first = program.launches[0]
            if gate == "sigmoid" and not packed:
                made = compiled(source_of_launch(first, program.buffers), "cuda", 90)
                assert made.asm["cubin"][:4] == b"\\x7fELF"
print(*sorted(names))
"""


def test_programs_are_made_and_compiled_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 10
