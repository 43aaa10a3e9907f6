"""Decoding one token, and whole models: the tasks "decode" and "model" of `runs`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tfla
from tfla.bench import check, measure, roofline
from tfla.bench.cases import DTYPES, STEP_PEERS, Shape, peer_words
from tfla.bench.runs import Row, Task, Tell, reason_of
from tfla.gates import INPUT_GATES
from tfla.xlstm import XLSTM, XLSTMConfig

STEP_BOUND = 2.0**-7  # h and C of one token from fp32 states, whatever the dtype of h


def steps(cpu: bool, peers: str) -> list[str]:
    """Who is timed: ours, attention that looks back at T tokens, and the peer where it is here."""
    names = [f"tfla {gate}" for gate in INPUT_GATES]
    names += [] if cpu else [f"{name}, CUDA graph" for name in names]
    here = importlib.util.find_spec("mlstm_kernels") is not None
    others = [name for name in STEP_PEERS if here or not name.startswith("mlstm_kernels")]
    words = peer_words(peers)
    return names + [x for x in others if any(word in x for word in words)]


def _gate(name: str) -> str:
    """The input gate that a name of ``steps`` tells of; attention has none and takes any."""
    words = name.replace(",", " ").split()
    return next((gate for gate in INPUT_GATES if gate in words), "exp")


@torch.no_grad()
def decode(task: Task, device: torch.device, tell: Tell) -> None:
    """One token of B sequences, their states updated in place (the peer returns new ones)."""
    assert task.shape is not None
    shape, dtype = task.shape, DTYPES[task.dtype]
    rows: dict[str, Row] = {}
    runs: dict[str, measure.Run] = {}
    for name in task.names:
        tell("begin", name, "checking the step")
        rows[name] = row = task.row(name, ours=name.startswith("tfla"), **{"pass": "step"})
        function = _gate(name)
        row["function"] = function
        try:
            if name == "attention":
                size = dtype.itemsize
                row["bytes"] = shape.B * shape.H * 2 * size * shape.V * (shape.T + 2)
                row["note"] = f"reads the keys and values of {shape.T:,} tokens"
                runs[name] = _attention_step(shape, dtype, device)
                continue
            row["bytes"] = roofline.step_bytes(
                shape.B, shape.H, shape.K, shape.V, INPUT_GATES[function].normalize, dtype.itemsize
            )
            x, state = step_inputs(shape, dtype, device, function)
            truth = check.step_truth(function, x, state)
            h, after = _step(name, x, state)()
            found = (h, after.C * (1.0 if after.m is None else after.m.exp()[..., None, None]))
            row["errors"] = {
                part: ((a.double() - b).norm() / b.norm()).item()
                for part, a, b in zip(("h", "C"), found, truth, strict=True)
            }
            if not max(row["errors"].values()) <= STEP_BOUND:
                row |= {"status": "WRONG", "reason": f"off from fp64: {row['errors']}"}
                continue
            x, state = step_inputs(shape, dtype, device, function)
            call = _step(name, x, state)
            call()
            measure.synchronize(device)
            runs[name] = _repeated(call, name.endswith("graph"))
        except Exception as error:
            row |= {"status": "failed", "reason": reason_of(error)}
    tell("begin", "", "timing in turns")
    times = measure.in_turns(runs, device, task.repeats, task.seconds, task.warm)
    for name, row in rows.items():
        found_times = times.get(name)
        if isinstance(found_times, Exception):
            row |= {"status": "failed", "reason": reason_of(found_times)}
        elif found_times is not None:
            row["samples_ms"] = found_times
            row["host_us"] = measure.host_us(runs[name], device)
        tell("row", row)


def step_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, function: str
) -> tuple[dict[str, Tensor], tfla.State]:
    """q, k, v, i and f of one token of ``shape.B`` sequences, and a state before it."""
    B, _, H, K, V, _ = dataclasses.astuple(shape)
    g = torch.Generator(device).manual_seed(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    x = {"q": normal(B, H, K), "k": normal(B, H, K), "v": normal(B, H, V)}
    x = {name: t.to(dtype) for name, t in x.items()} | {"i": normal(B, H), "f": 3 + normal(B, H)}
    C = normal(B, H, K, V)
    if not INPUT_GATES[function].normalize:
        return x, tfla.State(C, None, None)
    return x, tfla.State(C, normal(B, H, K), torch.zeros(B, H, device=device))


def _step(
    name: str, x: dict[str, Tensor], state: tfla.State
) -> Callable[[], tuple[Tensor, tfla.State]]:
    if name.startswith("tfla"):
        gate = _gate(name)
        return lambda: tfla.mlstm_step(**x, state=state, input_gate=gate, inplace=True)  # type: ignore[arg-type]
    module = importlib.import_module("mlstm_kernels.torch")
    step = module.get_mlstm_step_kernel("triton" if x["q"].is_cuda else "native")
    assert state.m is not None
    given: dict[str, Any] = {**x, "c": state.C, "n": state.n, "m": state.m[..., None]}
    given |= {gate: x[gate][..., None].to(x["q"].dtype) for gate in ("i", "f")}

    def call() -> tuple[Tensor, tfla.State]:
        h, (C, n, m) = step(**given)
        return h, tfla.State(C, n, m[..., 0])

    return call


def _attention_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> measure.Run:
    D = 128 if shape.H * shape.V % 128 == 0 else shape.V
    heads = shape.H * shape.V // D
    q = torch.randn(shape.B, heads, 1, D, device=device).to(dtype)
    k, v = torch.randn(2, shape.B, heads, shape.T, D, device=device).to(dtype).unbind()
    return lambda _: F.scaled_dot_product_attention(q, k, v)


def _repeated(call: Callable[[], Any], graph: bool) -> measure.Run:
    """`call` each turn; or replays of it as a CUDA graph, the device's time without the host's."""
    if not graph:
        return lambda _: call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    return lambda _: recorded.replay()


# ---------------------------------------------------------------- whole models

SIZES = {
    "tiny": {"vocab_size": 256, "hidden_size": 256, "num_layers": 4, "num_heads": 4},
    "160m": {"vocab_size": 50304, "hidden_size": 768, "num_layers": 12, "num_heads": 4},
    "400m": {"vocab_size": 50304, "hidden_size": 1024, "num_layers": 24, "num_heads": 4},
    "1.3b": {"vocab_size": 50304, "hidden_size": 2048, "num_layers": 24, "num_heads": 4},
    "7b": {"vocab_size": 50304, "hidden_size": 4096, "num_layers": 32, "num_heads": 8},
}
LOGITS_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


def model(task: Task, device: torch.device, tell: Tell) -> None:
    """Prefill of T tokens, decode steps of B sequences (on a GPU replayed from a CUDA graph, as in
    generation), and a training step (loss, gradients, AdamW) of B sequences of T tokens."""
    assert task.shape is not None
    dtype, (B, T) = DTYPES[task.dtype], (task.shape.B, task.shape.T)
    for name in task.names:
        gate = name.removeprefix("tfla ")
        config = XLSTMConfig(**SIZES[task.size], input_gate=gate)  # type: ignore[arg-type]
        tell("begin", name, "building the model")
        torch.manual_seed(0)
        with torch.device(device):
            net = XLSTM(config).to(dtype)
        tokens = torch.randint(config.vocab_size, (B, T + 1), device=device)
        base = task.row(name, ours=True, size=task.size, parameters=config.num_parameters())
        weights = sum(p.numel() * p.element_size() for p in net.parameters())
        tell("begin", name, "checking the step against the sequence")
        error = step_error(net, tokens[:1, :64])
        base["errors"] = {"logits of step and sequence": error}
        if not error <= LOGITS_BOUND[dtype]:
            tell("row", {**base, "status": "WRONG", "reason": f"step and sequence differ: {error}"})
            continue
        counts = {"prefill": T, "decode": B, "train step": B * T}
        for part, run in parts(net, tokens).items():
            tell("begin", name, part)
            chunk = 0 if part == "decode" else roofline.L_NOMINAL
            flops = config.flops_per_token(part == "train step", chunk=chunk)
            row = {**base, "pass": part, "tokens": counts[part], "flops": counts[part] * flops}
            # The weights once; in training read twice and their gradients written.
            row["bytes"] = weights * (3 if part == "train step" else 1)
            row["bytes"] += 2 * config.state_bytes(B) if part == "decode" else 0
            try:
                row["peak_bytes"] = measure.peak_bytes(run, device)
                found = measure.in_turns({part: run}, device, task.repeats, task.seconds, task.warm)
                if isinstance(times := found[part], Exception):
                    raise times
                row["samples_ms"] = times
            except Exception as problem:
                row |= {"status": "failed", "reason": reason_of(problem)}
            tell("row", row)


@torch.no_grad()
def step_error(net: XLSTM, tokens: Tensor) -> float:
    """How far the last logits of a decode step are from those of the whole sequence, relative."""
    whole, _ = net(tokens)
    _, state = net(tokens[:, :-1], output_state=True)
    last, _ = net.step(tokens[:, -1], state)
    return ((last - whole[:, -1]).norm() / whole[:, -1].norm()).item()


def parts(net: XLSTM, tokens: Tensor) -> dict[str, measure.Run]:
    """What is timed of a model, by name. tokens (B, T + 1)."""
    state = net.init_state(len(tokens))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    @torch.no_grad()
    def prefill(_: int) -> object:
        x, after = net.hidden(tokens[:1, :-1], output_final_state=True)
        return net.logits(x[:, -1]), after

    @torch.no_grad()
    def step() -> object:
        return net.step(tokens[:, 0], state, inplace=True)[0]

    def train(_: int) -> object:
        logits, _state = net(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return {"prefill": prefill, "decode": _repeated(step, tokens.is_cuda), "train step": train}
