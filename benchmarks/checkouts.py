"""Two versions of tfla by turns in one process: python benchmarks/checkouts.py OLD NEW

    python benchmarks/checkouts.py main .  # a revision, and the working tree
    python benchmarks/checkouts.py ../old ../new --only "mlstm exp" --launches
    python benchmarks/checkouts.py HEAD~1 . --shape 2,512,2,32,64 --device cpu

OLD and NEW are folders that hold a package `tfla`, or revisions of this repository. Two processes
on one GPU differ by up to 8% with the same kernels, as their memory lies elsewhere; here both
versions work on the same tensors, and OLD is timed a second time under the name "again": what that
differs by is noise.

Before a case is timed its results are compared. Each version is held against fp64 where the truth
is known (`tfla bench` has the bounds), and NEW against OLD: "off" is the largest relative distance
of a result, 0 if all bits are the same. What is wrong has no time, and the exit status is 1. A case
that a version does not have is a line that says so.

    mlstm GATE       forward; forward and all gradients
    step GATE        a token of 64 sequences, states in place
    model            prefill, a decode step and a training step of an xLSTM (--size)

More cases: --cases FILE.py, which defines CASES, from a name to a function of (tfla, device, dtype)
that returns the call to be timed; what the call returns, tensors or None, is compared.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import math
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tfla.bench import cases, check, measure, models
from tfla.bench.cases import DTYPES, Shape
from tfla.gates import INPUT_GATES

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], Any]


# ------------------------------------------------------------------------------- versions


def sources(where: str, folder: Path) -> Path:
    """The package `tfla` of a folder or of a revision; what is unpacked goes into `folder`."""
    if (Path(where) / "tfla" / "__init__.py").is_file():
        return Path(where) / "tfla"
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", where, "tfla"]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        said = archive.stderr.decode(errors="replace").strip()
        raise SystemExit(f"{where} is no folder with a package tfla and no revision: {said}")
    packed = folder / "tfla.tar"
    packed.write_bytes(archive.stdout)
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    return folder / "tfla"


def load(where: str, name: str, folder: Path) -> ModuleType:
    """A version of the package under another name, so that two fit into a process: in a copy of
    its sources the word tfla, wherever it stands, is that name. Modules, operators of torch.library
    and the sources that Triton reads are then each version's own."""
    own = folder / f"source of {name}"
    own.mkdir()
    package = sources(where, own)
    copy = folder / name
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, copy, ignore=ignore)
    for path in copy.rglob("*.py"):
        path.write_text(re.sub(r"\btfla\b", name, path.read_text()))
    return importlib.import_module(name)


# ------------------------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape
    size: str  # of the model, a key of models.SIZES


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one version has of a case. wrong: what is wrong in it; empty if nothing is."""

    call: Call
    wrong: str = ""


def from_fp64(errors: str) -> str:
    return f"off from fp64: {errors}" if errors else ""


Case = Callable[[ModuleType, Setting], Entry]


def mlstm(gate: str, backward: bool) -> Case:
    """A call over whole sequences, alone or with all of its gradients."""

    def make(tfla: ModuleType, at: Setting) -> Entry:
        known = next(x for x in cases.IMPLEMENTATIONS if x.name == f"tfla {gate}")
        x = dataclasses.replace(known, call=lambda given: tfla.mlstm(**given, input_gate=gate)[0])
        verdict = check.judge(x, at.shape, at.dtype, at.device)
        leaves = x.leaves(at.shape, at.dtype, at.device, 11)
        dh = x.leaves(at.shape, at.dtype, at.device, 12)["v"].detach()

        @torch.no_grad()
        def forward() -> Tensor:
            return x.call(leaves)

        def both() -> list[Tensor]:
            h = x.call(leaves)
            return [h.detach(), *torch.autograd.grad(h, list(leaves.values()), dh)]

        wrong = (f"{name} {verdict.errors[name]:.1e}" for name in verdict.exceeded)
        return Entry(both if backward else forward, from_fp64(", ".join(wrong)))

    return make


def step(gate: str) -> Case:
    """One token of 64 sequences, their states in place."""

    @torch.no_grad()
    def make(tfla: ModuleType, at: Setting) -> Entry:
        shape = dataclasses.replace(at.shape, B=64)
        x, state = models.step_inputs(shape, at.dtype, at.device, gate)
        truth = check.step_truth(gate, x, state)
        own = tfla.State(*state)

        def call() -> list[Tensor]:
            with torch.no_grad():
                h, _ = tfla.mlstm_step(**x, state=own, input_gate=gate, inplace=True)
            return [h, *(t for t in own if t is not None)]

        h, C, *rest = call()
        C = C * rest[1].exp()[..., None, None] if rest else C
        off = [distance(a, b) for a, b in zip((h, C), truth, strict=True)]
        bad = not max(off) <= models.STEP_BOUND
        return Entry(call, from_fp64(f"h {off[0]:.1e}, C {off[1]:.1e}") if bad else "")

    return make


def model(part: str) -> Case:
    """One of "prefill", "decode" and "train step" of an xLSTM; its steps must be its sequence."""

    def make(tfla: ModuleType, at: Setting) -> Entry:
        xlstm = importlib.import_module(f"{tfla.__name__}.xlstm")
        config = xlstm.XLSTMConfig(**models.SIZES[at.size])
        torch.manual_seed(0)
        with torch.device(at.device):
            net = xlstm.XLSTM(config).to(at.dtype)
            tokens = torch.randint(config.vocab_size, (at.shape.B, at.shape.T + 1))
        off = models.step_error(net, tokens[:1, :64])
        run = models.parts(net, tokens)[part]
        bad = not off <= models.LOGITS_BOUND[at.dtype]
        return Entry(
            lambda: run(0), f"steps are off from their sequence by {off:.1e}" if bad else ""
        )

    return make


def own_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for gate in INPUT_GATES:
        found[f"mlstm {gate} forward"] = mlstm(gate, backward=False)
        found[f"mlstm {gate} with backward"] = mlstm(gate, backward=True)
        found[f"step {gate}"] = step(gate)
    for part in ("prefill", "decode", "train step"):
        found[f"model {part}"] = model(part)
    return found


def cases_of(path: Path) -> dict[str, Case]:
    """CASES of a file: name -> function of (tfla, device, dtype) that makes the call."""
    made = runpy.run_path(str(path))["CASES"]

    def case(make: Callable[..., Call]) -> Case:
        return lambda tfla, at: Entry(make(tfla, at.device, at.dtype))

    return {name: case(make) for name, make in made.items()}


# ------------------------------------------------------------------------------- comparison


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; 0 for the same bits, NaN where one of them is not finite."""
    if a.shape != b.shape:
        return math.inf
    if torch.equal(a, b):
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def tensors(found: Any) -> Iterator[Tensor]:
    """What a call returned, copied: a call may hand out the same memory each time."""
    if isinstance(found, Tensor):
        yield found.detach().clone()
    elif isinstance(found, Sequence):
        for each in found:
            yield from tensors(each)


@dataclasses.dataclass
class Row:
    """A line of the table. off: NEW from OLD. wrong, reason: why there is no time."""

    case: str
    off: float | None = None
    wrong: str = ""
    reason: str = ""
    samples_ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    launches: dict[str, list[tuple[str, float]]] = dataclasses.field(default_factory=dict)

    def ratios(self, version: str) -> list[float]:
        """Of each turn, the time of a version over that of OLD in the same turn."""
        pairs = zip(self.samples_ms[version], self.samples_ms["old"], strict=True)
        return [a / b for a, b in pairs]

    def __str__(self) -> str:
        head = f"{self.case:<28}"
        if self.wrong or self.reason:
            return f"{head} {'WRONG: ' + self.wrong if self.wrong else self.reason}"
        old, new = (statistics.median(self.samples_ms[x]) for x in ("old", "new"))
        cells = []
        for version in ("new", "again"):
            low, middle, high = statistics.quantiles(self.ratios(version), n=4)
            cells.append(f"{middle:.3f} ({low:.3f}-{high:.3f})")
        return f"{head} {old:10.3f} {new:10.3f} {cells[0]:>21} {cells[1]:>21} {self.off:8.0e}"


def compare(name: str, make: Case, versions: Mapping[str, ModuleType], options: Any) -> Row:
    """One row: how far NEW is from OLD, what is wrong, and the milliseconds of both by turns."""
    at, row = options.setting, Row(case=name)
    entries: dict[str, Entry] = {}
    for version, tfla in versions.items():
        try:
            entries[version] = make(tfla, at)
            if entries[version].wrong:
                row.wrong = f"{version}: {entries[version].wrong}"
        except (AttributeError, TypeError, ImportError) as error:
            row.reason = f"{version} does not have it: {type(error).__name__}: {error}"
            return row
    old, new = (list(tensors(entry.call())) for entry in entries.values())
    if len(old) != len(new):
        row.wrong = row.wrong or f"{len(old)} results and {len(new)}"
    row.off = max((distance(b, a) for a, b in zip(old, new, strict=False)), default=0.0)
    if not row.off <= options.off:
        row.wrong = row.wrong or f"the versions differ by {row.off:.1e}, beyond {options.off:.1e}"
    del old, new
    if row.wrong:
        return row
    calls = {version: entry.call for version, entry in entries.items()}
    calls["again"] = calls["old"]
    runs = {version: (lambda _, call=call: call()) for version, call in calls.items()}
    found = measure.in_turns(runs, at.device, options.repeats, options.seconds, options.warm)
    for version, times in found.items():
        if isinstance(times, Exception):
            row.reason = f"{version}: {type(times).__name__}: {times}"
            return row
        row.samples_ms[version] = times
    if options.launches and at.device.type == "cuda":
        row.launches = {version: measure.by_launch(calls[version]) for version in versions}
    return row


HEAD = (
    f"{'':<28} {'old ms':>10} {'new ms':>10} {'new/old (quartiles)':>21} {'noise':>21} {'off':>8}"
)


def spent(row: Row) -> Iterator[str]:
    """Where the time goes, by launch."""
    for version, launches in row.launches.items():
        total = sum(us for _, us in launches)
        each = ", ".join(f"{kernel[:40]} {us:.0f}" for kernel, us in launches)
        yield f"  {version}: {total:.0f} us: {each}"


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="folder or revision")
    parser.add_argument("new", help="folder or revision")
    parser.add_argument("--only", default="", help="cases with one of these words, with commas")
    parser.add_argument("--cases", type=Path, help="a Python file that defines more of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--shape", help="B,T,H,K,V; default: 4,16384,16,128,256, on a CPU smaller")
    parser.add_argument("--size", choices=models.SIZES, default="tiny", help="of the model")
    parser.add_argument("--repeats", type=int, default=30, help="turns that count")
    parser.add_argument("--warm", type=int, default=5, help="turns before them")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one case at most")
    parser.add_argument("--off", type=float, help="largest distance of NEW from OLD")
    parser.add_argument("--launches", action="store_true", help="also the time of each kernel")
    parser.add_argument("--out", type=Path, help="a JSON with every sample")
    options = parser.parse_args(words)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = DTYPES[options.dtype or ("bf16" if cuda else "fp32")]
    sizes = options.shape or ("4,16384,16,128,256" if cuda else "1,2048,4,64,64")
    shape = Shape(*map(int, sizes.split(",")))
    if (
        options.off is None
    ):  # both are right: each within its bound of the truth, df's is the widest
        options.off = 2 * check.bound("df", dtype)
    options.setting = Setting(device, dtype, shape, options.size)
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    made = own_cases() | (cases_of(options.cases) if options.cases else {})
    wanted = [word.strip() for word in options.only.split(",") if word.strip()]
    chosen = {n: case for n, case in made.items() if not wanted or any(w in n for w in wanted)}
    if not chosen:
        raise SystemExit(f"--only {options.only} is in no name of: {', '.join(made)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        versions = {
            version: load(where, f"tfla_{version}", Path(folder))
            for version, where in (("old", options.old), ("new", options.new))
        }
        at = options.setting
        print(f"{measure.machine(at.device)['device']}, {at.dtype}, {at.shape}, model {at.size}")
        print(HEAD, flush=True)
        for name, make in chosen.items():
            rows.append(compare(name, make, versions, options))
            print("\n".join([str(rows[-1]), *spent(rows[-1])]), flush=True)
            gc.collect()
    if options.out:
        about = {"old": options.old, "new": options.new, "machine": measure.machine(at.device)}
        about |= {"dtype": str(at.dtype), "shape": dataclasses.asdict(at.shape), "size": at.size}
        result = about | {"rows": [dataclasses.asdict(row) for row in rows]}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
