"""The benchmarks themselves: tasks that are worked off in a process of their own, row by row.

Whatever a peer does in there (raise, crash, hang, poison the GPU's context) becomes a row with its
reason; the process starts anew without it and goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tfla.bench import cases, check, measure, roofline
from tfla.bench.cases import DTYPES, Implementation, Shape
from tfla.dtypes import products_of
from tfla.gates import input_gate
from tfla.plan import Problem, plan

Row = dict[str, Any]
Tell = Callable[..., None]

STARTING = 120.0  # more seconds for a process to begin: imports, on a busy machine
TASKS = {
    "ceiling": "tfla.bench.runs:ceiling",
    "kernels": "tfla.bench.runs:kernels",
    "decode": "tfla.bench.models:decode",
    "model": "tfla.bench.models:model",
    "transfer": "tfla.bench.transfer:transfer",
    "bias": "tfla.bench.bias:bias",
    "language_plan": "tfla.bench.language:plan",
    "language": "tfla.bench.language:language",
}


class Described(Protocol):
    """What a task does, where its kind has more to say than the fields of `Task`."""

    def describe(self) -> Row:
        """What of it belongs into a result: sizes, no paths."""


@dataclass(frozen=True)
class Task:
    """One comparison: `names` in turns. kind: a key of TASKS."""

    kind: str
    device: str
    dtype: str
    names: tuple[str, ...] = ()
    shape: Shape | None = None
    repeats: int = 30
    warm: int = 10
    seconds: float = 60.0  # of measuring, a pass
    chunks: tuple[int, ...] = ()
    study: str = ""  # which question the row answers: "length", "heads", "chunk", ...
    size: str = ""  # of a model
    input_gates: tuple[float, ...] = ()  # pre-activations of "transfer"
    forget_gates: tuple[float, ...] = ()
    epsilons: tuple[float, ...] = ()  # of its norms
    work: Described | None = None  # what "bias" and "language" train
    until: float = float("inf")  # time.time() after which it is not begun

    def implementations(self) -> list[Implementation]:
        """Those that `names` lists, at each of `chunks` if there are any."""
        found = list(cases.IMPLEMENTATIONS)
        found = cases.with_chunks(found, list(self.chunks)) if self.chunks else found
        return [x for x in found if x.name in self.names]

    def row(self, name: str, **fields: Any) -> Row:
        """A row of the result for the implementation `name`, with further fields."""
        shape = None if self.shape is None else dataclasses.asdict(self.shape)
        if shape is not None and shape["G"] is None:  # as rows of other studies always were
            del shape["G"]
        head: Row = {"kind": self.kind, "study": self.study, "implementation": name, "shape": shape}
        if self.input_gates:
            head |= {"i": self.input_gates, "f": self.forget_gates, "eps": self.epsilons}
        if self.work is not None:
            head |= self.work.describe()
        return {**head, "dtype": self.dtype, "status": "ok", **fields}


def work_off(tasks: Sequence[Task], limit: float) -> Iterator[Row]:
    """The rows of all tasks. `limit`: seconds that one step of one implementation may take."""
    context = multiprocessing.get_context("spawn")
    waiting = list(tasks)
    while waiting:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(send, waiting), daemon=True)
        child.start()
        send.close()
        name, what, reason = "", "starting", ""
        done = 0
        rows: list[Row] = []  # of the task at hand: only whole tasks count
        try:
            while done < len(waiting):
                if not receive.poll(limit + (STARTING if what == "starting" else 0)):
                    reason = f"{what} took longer than {limit:.0f} s"
                    break
                kind, *message = receive.recv()
                if kind == "begin":
                    name, what = message
                elif kind == "row":
                    rows.append(message[0])
                elif kind == "failed":
                    reason = message[0]
                else:
                    yield from rows
                    rows, done = [], done + 1
        except EOFError:
            child.join(5)
            reason = reason or f"the process ended while {what} (exit status {child.exitcode})"
        finally:
            if child.is_alive():
                child.kill()
            child.join()
        waiting = waiting[done:]
        if not waiting:
            return
        task = waiting[0]
        blamed = [name] if name in task.names else list(task.names) or [name or task.kind]
        yield from (task.row(n, status="failed", reason=reason) for n in blamed)
        left = tuple(n for n in task.names if n not in blamed)
        waiting = [dataclasses.replace(task, names=left)] * bool(left) + waiting[1:]


def _work(send: Any, tasks: list[Task]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # peers and the profiler write there
    for task in tasks:
        device = torch.device(task.device)
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)

        def tell(kind: str, *message: Any, device: torch.device = device) -> None:
            if kind == "row":
                try:
                    measure.synchronize(device)
                except Exception as error:  # the device's context is gone
                    send.send(("failed", reason_of(error)))
                    os._exit(1)
            send.send((kind, *message))

        if time.time() > task.until:
            late = {"status": "skipped", "reason": "out of time; raise --seconds"}
            for name in task.names:
                send.send(("row", task.row(name, **late)))
        else:
            module, function = TASKS[task.kind].split(":")
            try:
                getattr(importlib.import_module(module), function)(task, device, tell)
            except Exception as error:
                send.send(("failed", reason_of(error)))
                os._exit(1)
        send.send(("done",))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """An error in one line of at most 200 letters and its type."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def ceiling(task: Task, device: torch.device, tell: Tell) -> None:
    """A row with the machine, and what a copy and a matrix product reach on it."""
    found = measure.ceiling(device, DTYPES[task.dtype])
    tell("row", task.row("", machine=measure.machine(device), ceiling=found))


def kernels(task: Task, device: torch.device, tell: Tell) -> None:
    """forward (no gradients wanted) and forward+backward (all gradients, none accumulated)."""
    assert task.shape is not None
    dtype, shape = DTYPES[task.dtype], task.shape
    rows: dict[str, Row] = {}
    inputs: dict[str, list[tuple[cases.Leaves, Tensor]]] = {}
    chosen = {x.name: x for x in task.implementations()}
    for name, x in chosen.items():
        about = {"function": x.function, "note": x.note, "chunk": x.chunk, "ours": x.ours}
        rows[name] = row = task.row(name, **about)
        if shape.T % x.multiple:
            row |= {"status": "skipped", "reason": f"T must be a multiple of {x.multiple}"}
            continue
        tell("begin", name, "checking")
        try:
            _judge(row, x, shape, dtype, device)
            if row["status"] == "ok":
                tell("begin", name, "warming up")
                inputs[name] = _prepare(row, x, shape, dtype, device)
        except Exception as error:  # a peer that fails is a line, never an aborted run
            row |= {"status": "failed", "reason": reason_of(error)}
        tell("begin", name, "synchronizing")
        measure.synchronize(device)
    tell("begin", "", "timing in turns")
    for backward in (False, True):
        runs = {n: _run(chosen[n], sets, backward) for n, sets in inputs.items()}
        times = measure.in_turns(runs, device, task.repeats, task.seconds, task.warm)
        for name, row in rows.items():
            result = {**row, "pass": "forward+backward" if backward else "forward"}
            found = times.get(name)
            if isinstance(found, Exception):
                result |= {"status": "failed", "reason": reason_of(found)}
            elif found is not None:
                result |= chosen[name].cost(shape, dtype.itemsize, backward)
                result["samples_ms"] = found
                result["host_us"] = measure.host_us(runs[name], device)
                result["peak_bytes"] = measure.peak_bytes(runs[name], device)
                if row["ours"] and device.type == "cuda":
                    result |= _plan(chosen[name], shape, dtype, device, backward)
            elif backward:
                continue  # said once
            tell("row", result)


def _judge(
    row: Row, x: Implementation, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    verdict = check.judge(x, shape, dtype, device)
    row |= dataclasses.asdict(verdict)
    wrong = verdict.exceeded if x.ours else []
    if not verdict.errors["h"] <= check.NOT_THE_FUNCTION:
        wrong = ["h"]
    if wrong:
        worst = ", ".join(f"{name} {verdict.errors[name]:.1e}" for name in wrong)
        row |= {"status": "WRONG", "reason": f"off by {worst} from fp64"}


def _prepare(
    row: Row, x: Implementation, shape: Shape, dtype: torch.dtype, device: torch.device
) -> list[tuple[cases.Leaves, Tensor]]:
    """Two sets of (leaves, dh); both passes once outside of all clocks but that of first_s."""
    inputs = []
    for seed in (11, 12):
        leaves = x.leaves(shape, dtype, device, seed)
        inputs.append((leaves, torch.randn_like(leaves["v"])))
    began = time.perf_counter()
    for backward in (False, True):
        _run(x, inputs, backward)(0)
        measure.synchronize(device)
    row["first_s"] += time.perf_counter() - began
    return inputs


def _run(
    x: Implementation, inputs: list[tuple[cases.Leaves, Tensor]], backward: bool
) -> measure.Run:
    def forward(turn: int) -> object:
        with torch.no_grad():
            return x.run(inputs[turn % len(inputs)][0])

    def both(turn: int) -> object:
        leaves, dh = inputs[turn % len(inputs)]
        with x.pinned():  # the backward pass has the same plan
            h = x.call(leaves)
            return torch.autograd.grad(h, list(leaves.values()), dh.to(h.dtype))

    return both if backward else forward


def _plan(
    x: Implementation, shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool
) -> Row:
    """What our kernels cost by their plan: more than the function, which reads nothing twice."""
    planning: Any = importlib.import_module("tfla.kernels.planning")
    q = torch.empty(0, dtype=dtype, device=device)
    B, T, H, K, V, G = dataclasses.astuple(shape)
    problem = Problem(B, T, H, K, V, B, False, dtype.itemsize, products_of(dtype), G)
    planned = roofline.for_dtype(x.planned(plan(problem, planning.device_of(q))), dtype)
    if problem.R > 1:  # of groups the roofline knows the function, not the kernels
        return {"plan": str(planned)}
    found = roofline.kernels(problem, planned, input_gate(x.function).normalize, train=backward)
    moved, flops = sum(kernel.bytes for kernel in found), sum(kernel.flops for kernel in found)
    return {"plan": str(planned), "plan_bytes": moved, "plan_flops": flops}
