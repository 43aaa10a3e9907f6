"""Versions of tfla/kernels/hopper.py, by turns in one process: variants.py OLD.py NEW.py

Two processes on one GPU differ by up to 8% with the same kernels, as their memory lies elsewhere;
here all versions work on the same tensors. For each case and version the median microseconds of
every launch of forward + backward, and how far h and the gradients are from those of the first
version (0: the same bits). The versions may differ in hopper.py alone: what it takes from other
files, and what is asked of it, are those of the package. One GPU of compute capability 9.0.
"""

import argparse
import collections
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from regimes import DEVICE, by_launch, known, labels, passes, planned_for

import tfla.kernels
from tfla.bench.cases import Shape
from tfla.kernels import host

CASES = {
    "sigmoid 128/256": ("tfla sigmoid", Shape(4, 16384, 16, 128, 256)),
    "exp 128/256": ("tfla exp", Shape(4, 16384, 16, 128, 256)),
    "exp 256/512": ("tfla exp", Shape(4, 16384, 8, 256, 512)),
    "exp 64/128": ("tfla exp", Shape(4, 16384, 32, 64, 128)),
    "exp, one sequence": ("tfla exp", Shape(1, 65536, 16, 128, 256)),
}
HOPPER = "tfla.kernels.hopper"


def load(number: int, path: Path) -> Any:
    """The module in a file, under a name of its own, by which its kernels are compiled."""
    name = f"hopper_{number}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(module: Any) -> None:
    sys.modules[HOPPER] = tfla.kernels.hopper = module  # type: ignore[attr-defined]
    host._tapes.clear()  # they know the kernels of the version before


def compare(versions: dict[str, Any], case: str, rounds: int) -> None:
    name, shape = CASES[case]
    x = known(name)
    leaves = x.leaves(shape, torch.bfloat16, DEVICE, 11)
    forward, run = passes(x, leaves).values()
    times: dict[str, dict[Any, list[float]]] = {v: collections.defaultdict(list) for v in versions}
    off: dict[str, float] = {}
    first: list[torch.Tensor] = []
    for turn in range(rounds):
        for version in list(versions)[:: 1 if turn % 2 == 0 else -1]:
            use(versions[version])
            if version not in off:
                results: list[Any] = [forward(), *run()]  # type: ignore[misc]
                first = first or results
                pairs = zip(results, first, strict=True)
                apart = torch.stack([((a - b).norm() / b.norm()).float() for a, b in pairs])
                off[version] = apart.max().item()  # NaN, if one is
            seen = by_launch(run)
            names = labels([kernel for kernel, _ in seen], planned_for(shape)[1])
            for place, (launch, (_, us)) in enumerate(zip(names, seen, strict=True)):
                times[version][place, launch].append(us)
    for version, launches in times.items():
        each = {launch: statistics.median(us) for launch, us in launches.items()}
        print(f"{case}, {version}: {sum(each.values()):.0f} us, off {off[version]:.0e}:", end=" ")
        print(", ".join(f"{launch} {us:.0f}" for (_, launch), us in each.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--cases", default="sigmoid 128/256;exp 128/256", help="; ".join(CASES))
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    versions = {f"{n}: {path}": load(n, path) for n, path in enumerate(options.files, 1)}
    for case in options.cases.split(";"):
        compare(versions, case.strip(), options.rounds)


if __name__ == "__main__":
    main()
