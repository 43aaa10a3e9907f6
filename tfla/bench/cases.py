"""What is measured: shapes, their inputs, and the implementations, ours and others'.

Tensors are (B, T, H, .) here, "canonical"; an implementation that wants another layout gets its own
copy before the clock runs, and `canonical` turns its results back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tfla
from tfla.bench import roofline
from tfla.errors import RunError
from tfla.gates import INPUT_GATES
from tfla.plan import Plan
from tfla.reference import layout

Leaves = dict[str, Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H heads, head dims K of q and k and V of v."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"{self.H} heads {self.K}/{self.V}, B={self.B} T={self.T:,}"


@dataclass(frozen=True)
class Implementation:
    """One way to compute h, ours or another package's, from the tensors that are differentiated.

    Args:
        name: as it stands in tables; those that begin with "tfla" are ours.
        function: what it computes: the name of an input gate (that mLSTM), "simple" (log_f alone),
            "decay" (a constant a head), "ssd", "vector" (log_f a channel of k) or "attention".
        call: from the leaves, by name, to h.
        package, pip: what must be installed for it.
        devices: the types of device that it runs on.
        heads_first: its tensors are (B, H, T, .).
        multiple: T must divide by it.
        detached: its backward pass takes the normaliser for a constant.
        note: what a reader must know of it.
        chunk: tokens from one stored state to the next; None: as it is planned.
    """

    name: str
    function: str
    call: Callable[[Leaves], Tensor]
    package: str | None = None
    pip: str = ""
    devices: tuple[str, ...] = ("cuda",)
    heads_first: bool = False
    multiple: int = 1
    detached: bool = False
    note: str = ""
    chunk: int | None = None

    @property
    def ours(self) -> bool:
        """Is it one of this package?"""
        return self.name.startswith("tfla")

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        lacks = self.package is not None and importlib.util.find_spec(self.package) is None
        why = [f"not installed; {self.pip}"] if lacks else []
        if device.type not in self.devices:
            why = [f"runs on {' and '.join(self.devices)}, not on {device.type}", *why]
        return "; ".join(why) or None

    def shape(self, shape: Shape) -> Shape:
        """What it computes for ours: the same number of channels of v, in heads of its own."""
        width = shape.H * shape.V
        wanted = {"attention": 128, "ssd": 64}.get(self.function, shape.V)
        D = wanted if width % wanted == 0 else shape.V
        K = {"attention": D, "ssd": 128}.get(self.function, shape.K)
        return replace(shape, H=width // D, K=K, V=D)

    def leaves(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Leaves:
        """Fresh inputs in its own layout: q, k, v, i ~ N(0, 1), f ~ N(3, 1), gates in fp32."""
        B, T, H, K, V = (getattr(self.shape(shape), name) for name in "BTHKV")
        g = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(size, generator=g, device=device).to(dtype)

        shared = 1 if self.function == "ssd" else H  # its B and C (k and q) serve all heads
        x = {"q": normal(B, T, shared, K, dtype=dtype), "k": normal(B, T, shared, K, dtype=dtype)}
        x["v"] = normal(B, T, H, V, dtype=dtype)
        if self.function in INPUT_GATES:
            x |= {"i": normal(B, T, H), "f": 3 + normal(B, T, H)}
        elif self.function in ("simple", "vector"):
            x["log_f"] = F.logsigmoid(3 + normal(*x["k"].shape[: 3 + (self.function == "vector")]))
        elif self.function == "ssd":
            x |= {"dt": F.softplus(normal(B, T, H) - 4), "A": -1 - normal(H).sigmoid()}
        x = {name: self.canonical(t).contiguous() for name, t in x.items()}
        return {name: t.detach().requires_grad_() for name, t in x.items()}

    def canonical(self, x: Tensor) -> Tensor:
        """From its layout to (B, T, H, .) and back."""
        return x.transpose(1, 2) if self.heads_first and x.dim() > 2 else x

    def run(self, leaves: Leaves) -> Tensor:
        """h, in its own layout, with `chunk` as it asks for."""
        with self.pinned():
            return self.call(leaves)

    def cost(self, shape: Shape, size: int, backward: bool) -> dict[str, int]:
        """FLOPs and least bytes of its function, by one formula for all of a kind."""
        s = self.shape(shape)
        tokens = s.B * s.T
        if self.function == "attention":
            flops = roofline.attention_flops(tokens, s.T, s.H, s.K, backward)
        else:
            flops = roofline.function_flops(tokens, s.H, s.K, s.V, backward)
        gates = dict.fromkeys(INPUT_GATES, 8) | {"simple": 4, "ssd": 4, "vector": 4 * s.K}
        moved = (tokens, s.H, s.K, s.V, size, gates.get(self.function, 0), backward)
        return {"flops": flops, "bytes": roofline.least_bytes(*moved)}

    def planned(self, plan: Plan) -> Plan:
        """Our own plan with a checkpoint every `chunk` tokens."""
        if self.chunk is None or not self.ours:
            return plan
        every = max(self.chunk, plan.L)
        split_len = plan.split_len and max(plan.split_len, every)
        return replace(plan, checkpoint_every=every, split_len=split_len)

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """Make our own plan store a state every `chunk` tokens: on a GPU `checkpoint_every`,
        in the backend "reference" the chunk. None, or a peer: as planned."""
        if self.chunk is None or not self.ours:
            yield
            return
        before = layout.L
        with contextlib.ExitStack() as stack:
            if torch.cuda.is_available():
                planning: Any = importlib.import_module("tfla.kernels.planning")
                stack.enter_context(planning.changed(_change_of(self)))
            layout.L = self.chunk
            try:
                yield
            finally:
                layout.L = before


@functools.lru_cache(maxsize=64)  # one function an implementation, as calls that come again ask for
def _change_of(x: Implementation) -> Callable[[Plan], Plan]:
    return x.planned


# ---------------------------------------------------------------- the implementations


def _tfla(gate: str) -> Implementation:
    def call(x: Leaves) -> Tensor:
        return tfla.mlstm(**x, input_gate=gate)[0]  # type: ignore[arg-type]

    return Implementation(f"tfla {gate}", gate, call, devices=("cpu", "cuda"))


def _nxai(name: str, function: str, kernel: str, *, chunk: int, **fields: Any) -> Implementation:
    options = {"normalize": False} if function == "sigmoid" else {}

    def call(x: Leaves) -> Tensor:
        found = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel(kernel)
        return found(**x, autocast_kernel_dtype=x["q"].dtype, chunk_size=chunk, **options)

    pip = "pip install mlstm_kernels (NXAI Community License)"
    return Implementation(
        f"mlstm_kernels {name}",
        function,
        call,
        "mlstm_kernels",
        pip,
        heads_first=True,
        multiple=chunk,
        **fields,
    )


def _fla(name: str, function: str, path: str, *, note: str, **fields: Any) -> Implementation:
    module, attribute = path.split(":")
    options = {"layer_idx": 3, "num_layers": 32} if function == "decay" else {}

    def call(x: Leaves) -> Tensor:
        gate = {"g": x["log_f"]} if "log_f" in x else {}
        found = getattr(importlib.import_module(f"fla.ops.{module}"), attribute)
        return found(q=x["q"], k=x["k"], v=x["v"], **gate, **options)[0]

    pip = "pip install flash-linear-attention"
    return Implementation(f"fla {name}", function, call, "fla", pip, note=note, **fields)


def _attention(name: str, device: str, backend: SDPBackend | None = None) -> Implementation:
    def call(x: Leaves) -> Tensor:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)

    note = f"torch SDPA, causal; {_HEADS}"
    return Implementation(name, "attention", call, devices=(device,), heads_first=True, note=note)


def _ssd(x: Leaves) -> Tensor:
    module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    return module.mamba_chunk_scan_combined(x["v"], x["dt"], x["A"], x["k"], x["q"], 256)


_HEADS = "other heads for the same number of channels"
_HALF: dict[str, Any] = {
    "detached": True,
    "note": "its backward leaves out the gradient of the normaliser",
}
_CPU: dict[str, Any] = {"devices": ("cpu",), "note": "its plain PyTorch form, for CPUs"}
_XL = {"exp": "chunkwise--triton_xl_chunk", "sigmoid": "chunkwise--triton_xl_chunk_siging"}

IMPLEMENTATIONS: list[Implementation] = [
    *map(_tfla, INPUT_GATES),
    _nxai("xl exp", "exp", _XL["exp"], chunk=128, **_HALF),
    _nxai("xl sigmoid", "sigmoid", _XL["sigmoid"], chunk=128),
    _nxai("limit exp", "exp", "chunkwise--triton_limit_chunk", chunk=64, **_HALF),
    _nxai("torch exp", "exp", "chunkwise--native_autograd", chunk=64, **_CPU),
    _fla("simple_gla", "simple", "simple_gla:chunk_simple_gla", note="no input gate or normaliser"),
    _fla("gla", "vector", "gla:chunk_gla", note="a decay for every channel of k"),
    _fla("lightning", "decay", "lightning_attn:chunk_lightning_attn", note="constant decay"),
    _fla("torch simple_gla", "simple", "simple_gla.naive:naive_chunk_simple_gla", **_CPU),
    _attention("attention", "cpu"),
    _attention("attention cudnn", "cuda", SDPBackend.CUDNN_ATTENTION),
    _attention("attention flash", "cuda", SDPBackend.FLASH_ATTENTION),
    Implementation(
        "mamba2 ssd",
        "ssd",
        _ssd,
        "mamba_ssm",
        "pip install mamba-ssm --no-build-isolation (compiles, needs nvcc)",
        note=f"heads of 64, state 128, one group; {_HEADS}",
    ),
]


STEP_PEERS = ("mlstm_kernels step exp", "attention")  # of one token, see models.py


def peer_words(peers: str) -> list[str]:
    """The words of --peers, each a part of the names that are meant: [""], a part of all, for
    "all", and [] for "none". RunError for a word that is part of no name."""
    words = [word.strip() for word in peers.split(",") if word.strip()]
    if words in (["all"], ["none"]):
        return [""] if words == ["all"] else []
    names = [x.name for x in IMPLEMENTATIONS if not x.ours] + list(STEP_PEERS)
    unknown = [word for word in words if not any(word in name for name in names)]
    if unknown or not words:
        raise RunError(
            f"--peers is {peers!r}; "
            f"it must be all, none, or parts of {', '.join(dict.fromkeys(names))}"
        )
    return words


def chosen(peers: str) -> list[Implementation]:
    """Ours, and those of --peers; see `peer_words`."""
    words = peer_words(peers)
    return [x for x in IMPLEMENTATIONS if x.ours or any(word in x.name for word in words)]


def with_chunks(implementations: list[Implementation], chunks: list[int]) -> list[Implementation]:
    """Every one that can be cut at other places, at each of `chunks`."""
    found = []
    for x in implementations:
        for chunk in chunks:
            other = x
            if x.name.startswith("mlstm_kernels xl"):
                other = replace(
                    _nxai("", x.function, _XL[x.function], chunk=chunk),
                    detached=x.detached,
                    note=x.note,
                )
            if other is not x or x.ours:
                found.append(replace(other, name=f"{x.name} @{chunk}", chunk=chunk))
    return found
