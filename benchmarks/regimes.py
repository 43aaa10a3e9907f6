"""The regimes beside `tfla bench kernels`: python benchmarks/regimes.py [--only small,packed,...]

    small    one sequence of 512 to 4,096 tokens, 16 heads 128/256, whose launches take longer than
             its kernels
    packed   65,536 tokens as 1 to 16,384 documents of random lengths, 16 heads 128/256, as one
             sequence and, where their last states are wanted, document by document
    long     one sequence of 65,536 to 1,048,576 tokens, 8 heads 128/256: nanoseconds a token
    tf32     fp32 with products in TF32, 4 sequences of 4,096 tokens, beside mlstm_kernels
    fp16     the same in fp16
    fp32     with products in fp32, alone
    launches where the time of forward + backward goes, by the profiler, beside the bytes of each
             launch by its plan
    host     until the host is back from a call of 512 or 2,048 tokens, each alone and in a row

One GPU. Timed in turns as in `tfla bench`, by events; small also as calls one after the other and
from a CUDA graph. What is timed was held against fp64 first (its error is printed), a packed
document against the same one alone; long, launches and host take what `tfla bench` checks.
`mlstm_kernels` only has to be importable.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tfla
from tfla.bench import cases, check, measure, roofline
from tfla.bench.cases import Shape
from tfla.kernels.planning import device_of
from tfla.kernels.program import Program
from tfla.plan import Plan, Problem, plan
from tfla.programs import call_of, programs

DEVICE = torch.device("cuda")
Row = dict[str, Any]


def known(name: str) -> cases.Implementation:
    return next(x for x in cases.IMPLEMENTATIONS if x.name == name)


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Any]:
    """Median milliseconds of each, or what it raised."""
    turns = {name: (lambda _, run=run: run()) for name, run in runs.items()}
    found = measure.in_turns(turns, DEVICE, repeats, 20.0, 5)
    return {
        n: f"{type(x).__name__}: {str(x)[:80]}"
        if isinstance(x, Exception)
        else statistics.median(x)
        for n, x in found.items()
    }


def passes(x: cases.Implementation, leaves: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    dh = torch.randn_like(leaves["v"])

    def forward() -> object:
        with torch.no_grad():
            return x.call(leaves)

    def both() -> object:
        return torch.autograd.grad(x.call(leaves), list(leaves.values()), dh)

    return {f"{x.name}|forward": forward, f"{x.name}|with backward": both}


def compare(names: list[str], shape: Shape, dtype: torch.dtype, graph: bool = False) -> list[Row]:
    runs: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for name in names:
        x = known(name)
        why = x.missing(DEVICE) or (shape.T % x.multiple and f"T % {x.multiple}")
        row = rows[name] = {"name": name, "shape": str(shape), "dtype": str(dtype)[6:]}
        if why:
            row["reason"] = why
            continue
        began = time.perf_counter()
        try:
            verdict = check.judge(x, shape, dtype, DEVICE)
            row["error_h"], row["error_gradients"] = (
                verdict.errors["h"],
                max(e for n, e in verdict.errors.items() if n != "h"),
            )
            if x.ours and verdict.exceeded:
                row["reason"] = f"WRONG: {verdict.exceeded}"
                continue
            mine = passes(x, x.leaves(shape, dtype, DEVICE, 11))
            for run in mine.values():
                run()
            torch.cuda.synchronize()
            runs |= mine
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {str(error)[:100]}"
        row["first_s"] = round(time.perf_counter() - began, 1)
    for key, ms in timed(runs, 20).items():
        name, which = key.split("|")
        rows[name][f"{which} ms"] = ms
        if graph:
            rows[name][f"{which} one after the other ms"] = one_after_the_other(runs[key])
            if name.startswith("tfla") and which == "forward":
                rows[name]["forward in a graph ms"] = replay(runs[key])
    return list(rows.values())


def one_after_the_other(run: Callable[[], object], calls: int = 50) -> float:
    """Milliseconds a call when the device waits for the host, or the host for the device."""

    def all_calls() -> None:
        for _ in range(calls):
            run()

    return measure.until_done(all_calls, DEVICE, 1, 0)[0] / calls


def replay(run: Callable[[], object]) -> float:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed({"": graph.replay}, 20)[""]


def small() -> list[Row]:
    names = ["tfla exp", "tfla sigmoid", "attention cudnn"]
    return [
        row
        for T in (512, 1024, 2048, 4096)
        for row in compare(names, Shape(1, T, 16, 128, 256), torch.bfloat16, graph=True)
    ]


def packed() -> list[Row]:
    rows = []
    tokens, draw = 65536, torch.Generator().manual_seed(0)
    for documents in (1, 16, 256, 4096, 16384):
        cuts = torch.randint(1, tokens, (documents - 1,), generator=draw).sort().values
        cu = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).to(DEVICE)
        for gate, states in (("exp", False), ("sigmoid", False), ("exp", True)):
            if states and documents > 4096:
                continue  # 34 GB of them
            x = known(f"tfla {gate}")
            leaves = x.leaves(Shape(1, tokens, 16, 128, 256), torch.bfloat16, DEVICE, 11)
            options: dict[str, Any] = {"input_gate": gate, "output_final_state": states}

            def call(x: dict[str, Tensor], o: Any = options, cu: Tensor = cu) -> Tensor:
                return tfla.mlstm(**x, **o, cu_seqlens=cu)[0]  # type: ignore[arg-type]

            with torch.no_grad():
                last = slice(int(cu[-2]), tokens)
                inputs: Any = {n: t[:, last] for n, t in leaves.items()}
                alone = tfla.mlstm(**inputs, input_gate=gate)[0].double()
                off = ((call(leaves)[:, last] - alone).norm() / alone.norm()).item()
            mine = passes(dataclasses.replace(x, call=call), leaves)
            row = {"name": x.name, "documents": documents, "states": states, "off": off}
            for key, ms in timed(mine, 10).items():
                row[f"{key.split('|')[1]} ms"] = ms
            row["peak MiB"] = (
                measure.peak_bytes(lambda _, mine=mine: list(mine.values())[1](), DEVICE) / 2**20
            )
            rows.append(row)
            del leaves, mine
    return rows


def long() -> list[Row]:
    rows = []
    for T in (65536, 262144, 1048576):
        for gate in ("exp", "sigmoid"):
            x = known(f"tfla {gate}")
            leaves = x.leaves(Shape(1, T, 8, 128, 256), torch.bfloat16, DEVICE, 11)
            row: Row = {"name": x.name, "T": T}
            for key, ms in timed(passes(x, leaves), 6).items():
                which = key.split("|")[1]
                row[f"{which} ms"] = ms
                row[f"{which} ns a token"] = ms * 1e6 / T if isinstance(ms, float) else ms
            rows.append(row)
            del leaves
            torch.cuda.empty_cache()
    return rows


def planned_for(shape: Shape) -> tuple[Problem, Plan]:
    """In bf16."""
    problem = Problem(shape.B, shape.T, shape.H, shape.K, shape.V, shape.B, False, 2, "ieee")
    return problem, plan(problem, device_of(torch.empty(0, device=DEVICE)))


def both_passes(problem: Problem, gate: str) -> Sequence[Program]:
    """In bf16, on the GPU that is here."""
    device = device_of(torch.empty(0, device=DEVICE))
    found = programs(call_of(problem, torch.bfloat16, gate), device)
    return [one for one in found if one is not None]


def launches() -> list[Row]:
    ceiling = measure.ceiling(DEVICE, torch.bfloat16)["bytes_per_s"]
    rows = []
    for shape in (
        Shape(4, 16384, 16, 128, 256),
        Shape(1, 65536, 16, 128, 256),
        Shape(4, 16384, 8, 256, 512),
    ):
        problem, planned = planned_for(shape)
        for gate in ("exp", "sigmoid"):
            x = known(f"tfla {gate}")
            leaves = x.leaves(shape, torch.bfloat16, DEVICE, 11)
            run = passes(x, leaves)[f"{x.name}|with backward"]
            seen, found = measure.by_launch(run), dict[str, float]()
            names = labels([k for k, _ in seen], both_passes(problem, gate))
            for label, (_, us) in zip(names, seen, strict=True):
                found[label] = found.get(label, 0.0) + us
            moved = {k.name: k.bytes for k in roofline.kernels(problem, planned, gate == "exp")}
            for label, us in found.items():
                row: Row = {"name": x.name, "shape": str(shape), "launch": label, "us": us}
                if label in moved and "splits" not in label:  # the plan cannot know what is skipped
                    row["GB/s by plan"] = moved[label] / us / 1e3
                    row["share of a copy"] = moved[label] / us * 1e6 / ceiling
                rows.append(row)
            del leaves, run
            torch.cuda.empty_cache()
    return rows


def labels(kernels: list[str], program: Sequence[Program]) -> list[str]:
    """Of the kernels of a forward and a backward pass, in order, what their Programs call them;
    those of others, a copy say, by their own names."""
    ours = [launch for one in program for launch in one.launches]
    found = []
    for name in kernels:
        mine = bool(ours) and name == ours[0].kernel.__name__
        found.append(ours.pop(0).label if mine else name[:40])
    return found


def host(calls: int = 100) -> list[Row]:
    rows = []
    for T in (512, 2048):
        for name in ("tfla sigmoid", "tfla exp", "attention cudnn"):
            x = known(name)
            leaves = x.leaves(Shape(1, T, 16, 128, 256), torch.bfloat16, DEVICE, 11)
            tensors, dh = list(leaves.values()), torch.randn_like(leaves["v"])

            def forward(_: int, x: Any = x, leaves: Any = leaves) -> Tensor:
                return x.call(leaves)

            def backward(h: Tensor, tensors: Any = tensors, dh: Tensor = dh) -> object:
                return torch.autograd.grad(h, tensors, dh.to(h.dtype))

            def of_backward(forward: Any = forward, backward: Any = backward) -> float | None:
                done = [forward(turn) for turn in range(calls)]
                return measure.host_us(lambda turn: backward(done[turn]), DEVICE, calls)

            row: Row = {"name": name, "T": T}
            with torch.no_grad():
                row["forward us"] = measure.host_us(forward, DEVICE, calls)
            row["forward with gradients us"] = measure.host_us(forward, DEVICE, calls)
            row["backward us"] = of_backward()
            with torch.autograd.set_multithreading_enabled(False):
                row["backward in the caller's thread us"] = of_backward()
            began = time.perf_counter()
            for turn in range(50):  # fewer launches than wait in a GPU's queue
                backward(forward(turn))
            row["both in a row us"] = (time.perf_counter() - began) / 50 * 1e6
            torch.cuda.synchronize()
            rows.append(row)
    return rows


def dtypes(dtype: torch.dtype, precision: str, others: bool) -> list[Row]:
    torch.set_float32_matmul_precision(precision)
    names = ["tfla exp", "tfla sigmoid"]
    names += ["mlstm_kernels xl exp", "mlstm_kernels xl sigmoid"] if others else []
    rows = compare(names, Shape(4, 4096, 16, 128, 256), dtype)
    torch.set_float32_matmul_precision("highest")
    return [row | {"fp32 products": precision} for row in rows]


def main() -> None:
    studies: dict[str, Callable[[], list[Row]]] = {
        "small": small,
        "packed": packed,
        "long": long,
        "tf32": lambda: dtypes(torch.float32, "high", True),
        "fp16": lambda: dtypes(torch.float16, "highest", True),
        "fp32": lambda: dtypes(torch.float32, "highest", False),
        "launches": launches,
        "host": host,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(studies))
    parser.add_argument("--out", type=Path, default=Path("runs/regimes.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": measure.machine(DEVICE), "commit": measure.commit()}
    result["ceiling"] = measure.ceiling(DEVICE, torch.bfloat16)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        result[name] = studies[name]()
        print(f"\n{name}")
        for row in result[name]:
            print(
                "  "
                + ", ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                )
            )
        options.out.write_text(json.dumps(result, indent=1))
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
