"""Problems from a seed: the cases that the checks run, and the regimes of their gates."""

import dataclasses

import pytest
import recurrence as oracle
import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = [("exp", None), ("exp", False), ("sigmoid", None), ("sigmoid", True)]
NORMALIZED = [("exp", None), ("sigmoid", True)]
EXTREME = ["f=-1e5", "f=-1000", "f=-12", "f=+30", "i=-30", "i=+30", "i=-95", "i=+95"]
RESETS = ["resets 1%", "resets 50%", "swings"]

variants = pytest.mark.parametrize(("input_gate", "normalize"), VARIANTS)
normalized = pytest.mark.parametrize(("input_gate", "normalize"), NORMALIZED)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem from a seed. `lengths` packs documents (then B must be 1 and T their sum); `groups`
    are the heads of q and k (None: H)."""

    T: int = 65
    B: int = 2
    H: int = 2
    K: int = 12
    V: int = 10
    input_gate: str = "exp"
    normalize: bool | None = None
    gates: str = "ordinary"
    state: bool = True
    final: bool = True
    lengths: tuple[int, ...] | None = None
    groups: int | None = None
    reverse: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    gate_dtype: torch.dtype | None = None
    device: str = "cpu"
    backend: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        changed = (
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return (
            "-".join(f"{name}={value}".replace("torch.", "") for name, value in changed) or "plain"
        )

    @property
    def normalized(self) -> bool:
        return oracle.is_normalized(self.input_gate, self.normalize)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def rows(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)


def packed(*lengths: int, **fields: object) -> Case:
    return Case(B=1, T=sum(lengths), lengths=lengths, **fields)  # type: ignore[arg-type]


def offsets(
    lengths: tuple[int, ...], dtype: torch.dtype = torch.int64, device: str = "cpu"
) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).to(dtype).to(device)


def gate_values(kind: str, shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pre-activations (i, f) of one regime, (B,T,H) in fp64."""

    def normal() -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    i, f = normal(), normal() + 3
    if kind == "ordinary":
        return i, f
    if kind == "initial":  # the biases that xLSTM models start from
        return normal() * 0.3 - 10, normal() * 0.3 + 5
    if kind.startswith(("i=", "f=")):
        extreme = torch.full(shape, float(kind[2:]), dtype=torch.float64)
        return (extreme, f) if kind[0] == "i" else (i, extreme)
    if kind.startswith("resets"):
        share = float(kind.split()[1].rstrip("%")) / 100
        hit = torch.rand(shape, generator=g, dtype=torch.float64) < max(share, 2 / max(shape[1], 1))
        return i, torch.where(hit, -1e5, f)
    if kind == "infinite":  # masked tokens, exact resets, and gates that forget nothing
        draw = torch.rand(shape, generator=g, dtype=torch.float64)
        i = torch.where(draw < 0.2, -torch.inf, i)
        f = torch.where(
            draw > 0.9, -torch.inf, torch.where((0.1 < draw) & (draw < 0.5), torch.inf, f)
        )
        return i, f
    if kind == "swings":  # 60 orders of magnitude up and down between neighbours
        return torch.where(
            torch.rand(shape, generator=g, dtype=torch.float64) < 0.5, -30.0, 30.0
        ), f
    raise ValueError(f"no such gate regime: {kind}")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """On the CPU, rounded to the dtypes of the case; the cotangents G_C and G_n stay in fp64."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    f: Tensor
    memory: oracle.Memory | None
    dh: Tensor
    G_C: Tensor
    G_n: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype."""
        memory = self.memory and oracle.Memory(
            *(x if x is None else x.to(dtype) for x in self.memory)
        )
        tokens = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "i", "f", "dh")}
        return dataclasses.replace(self, memory=memory, **tokens)

    def leaves(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in "qkvif"}
        if self.memory is not None:
            named |= {f"{x}0": t for x, t in zip("Cnm", self.memory, strict=True) if t is not None}
        return named


def make_inputs(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(case.seed)
    B, T, H, K, V, N = case.B, case.T, case.H, case.K, case.V, case.rows

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    G = H if case.groups is None else case.groups
    q, k, v, dh = normal(B, T, G, K), normal(B, T, G, K), normal(B, T, H, V), normal(B, T, H, V)
    gate_dtype = case.gate_dtype or case.dtype
    i, f = (x.to(gate_dtype) for x in gate_values(case.gates, (B, T, H), g))
    memory = None
    if case.state:
        dtype = case.state_dtype
        C, n, m = (
            normal(N, H, K, V, dtype=dtype),
            normal(N, H, K, dtype=dtype),
            normal(N, H, dtype=dtype),
        )
        memory = oracle.Memory(C, n, m) if case.normalized else oracle.Memory(C, None, None)
    G_C = normal(N, H, K, V, dtype=torch.float64)
    return Inputs(q, k, v, i, f, memory, dh, G_C, normal(N, H, K, dtype=torch.float64))
