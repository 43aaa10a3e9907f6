"""tfla's functions as mlstm_kernels and transformers call them: heads before tokens.

    q, k (B, H, T, K)     v (B, H, T, V)     i, f (B, H, T)
    the state as three tensors: c (B, H, K, V)     n (B, H, K)     m (B, H, 1)

q, k, v and h are passed on as views; nothing is copied. A layer that is not normalised has no n and
m: what came in their place goes back, or zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tfla
from tfla.api import mlstm_allowing_tf32
from tfla.gates import InputGate

States = tuple[Tensor, Tensor, Tensor]
CLOSED = 1e4  # a gate at +-1e4 passes exactly 1 or exactly 0, in any floating dtype


def sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor | None = None,
    n: Tensor | None = None,
    m: Tensor | None = None,
    *,
    input_gate: InputGate = "exp",
    normalize: bool = True,
    states: bool = True,
    allow_tf32: bool = False,
) -> tuple[Tensor, States | None]:
    """``tfla.mlstm``: h (B, H, T, V), and with `states` (c, n, m) after the last token, in fp32.

    `allow_tf32`: fp32 products have 11 bits or more, whatever torch is set to.
    """
    mlstm = mlstm_allowing_tf32 if allow_tf32 else tfla.mlstm
    h, after = mlstm(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        i.transpose(1, 2),
        f.transpose(1, 2),
        input_gate=input_gate,
        normalize=normalize,
        initial_state=None if c is None else _state(c, n, m, normalize, q),
        output_final_state=states,
    )
    return h.transpose(1, 2), None if after is None else _three(after, n, m)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    *,
    input_gate: InputGate = "exp",
    normalize: bool = True,
    inplace: bool = False,
) -> tuple[Tensor, States]:
    """``tfla.mlstm_step``: q, k (B, H, K), v (B, H, V), i, f (B, H, 1); h (B, H, V) and the states.

    `inplace` updates c, n and m where they lie, if their dtypes allow it, and returns them.
    """
    state = tfla.State(c, n if normalize else None, m[..., 0] if normalize else None)
    full = _full(q)
    low = (full, torch.bfloat16)
    inplace = inplace and c.dtype in low and (not normalize or (n.dtype in low and m.dtype == full))
    if not inplace:
        state = _state(c, n, m, normalize, q, low=True)
    h, after = tfla.mlstm_step(
        q,
        k,
        v,
        i[..., 0],
        f[..., 0],
        state,
        input_gate=input_gate,
        normalize=normalize,
        inplace=inplace,
    )
    return h, (c, n, m) if inplace else _three(after, n, m)


def close(i: Tensor, f: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (B, H, T) such that tokens where `keep` (B, T) is False leave the state as it was."""
    idle = ~keep[:, None]
    return i.masked_fill(idle, -CLOSED), f.masked_fill(idle, CLOSED)


def _full(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _state(
    c: Tensor, n: Tensor | None, m: Tensor | None, normalize: bool, q: Tensor, low: bool = False
) -> tfla.State:
    """Their three tensors as a State; `low`: C and n may stay in bf16."""
    if normalize and (n is None or m is None):
        raise ValueError(
            "c_initial, n_initial and m_initial must be given together, or none of them."
        )
    full = _full(q)

    def own(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        # These packages overwrite a state with the next one; autograd needs the one that was used.
        y = x if x.dtype in dtypes else x.to(full)
        return y.clone() if y is x and torch.is_grad_enabled() else y

    some = (full, torch.bfloat16) if low else (full,)
    if n is None or m is None or not normalize:
        return tfla.State(own(c, some), None, None)
    return tfla.State(own(c, some), own(n, some), own(m, (full,))[..., 0])


def _three(state: tfla.State, n: Tensor | None, m: Tensor | None) -> States:
    """A State as their three tensors."""
    C = state.C
    if state.n is not None and state.m is not None:
        return C, state.n, state.m[..., None]
    n = C.new_zeros(C.shape[:3]) if n is None else n
    return C, n, C.new_zeros(*C.shape[:2], 1) if m is None else m
