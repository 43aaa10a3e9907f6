"""Each line of the tables in docs/migrate computes what the other package's line computes, by the
recurrence that it documents."""

import re
from collections.abc import Callable

import pytest
import torch
from pages import ROOT
from torch import Tensor
from torch.nn.functional import logsigmoid

import tfla


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    write: Tensor,
    *,
    scale: float,
    divide: bool = False,
) -> Tensor:
    """The recurrence as one would write it down: (B, T, H, .), without a gauge, token by token."""
    C = torch.zeros(*k[:, 0].shape, v.shape[-1])
    n = torch.zeros_like(k[:, 0])
    out = []
    for t in range(q.shape[1]):
        d, w = decay[:, t, :, None], write[:, t, :, None]
        n = d * n + w * k[:, t]
        C = d[..., None] * C + (w * k[:, t])[..., None] * v[:, t][..., None, :]
        h = (scale * q[:, t])[..., None, :] @ C
        out.append(h[..., 0, :])
        if divide:
            out[-1] = out[-1] / (scale * (q[:, t] * n).sum(-1, keepdim=True)).abs().clamp(min=1)
    return torch.stack(out, 1)


B, T, H, K, V, G = 2, 40, 4, 8, 12, 2
l, L = 3, 12
ROWS = [
    row
    for package in ("fla", "mlstm_kernels", "mamba_ssm")
    for row in re.findall(
        r"^\| `(.+?)` \| `(.+?)` \|$",
        (ROOT / f"docs/migrate/{package}.md").read_text("utf-8"),
        re.MULTILINE,
    )
]


def tensors() -> dict[str, Tensor]:
    """Inputs under the names that the rows of fla and the mLSTM use, (B, T, H, .)."""
    q, k = torch.randn(2, B, T, H, K)
    v = torch.randn(B, T, H, V)
    i, f, g = torch.randn(3, B, T, H)
    return {"q": q, "k": k, "v": v, "i": i, "f": f + 2, "g": logsigmoid(g)}


def run(right: str, **names: object) -> Tensor:
    public = {name: getattr(tfla, name) for name in tfla.__all__ if not name.startswith("_")}
    sizes = {"torch": torch, "H": H, "G": G, "l": l, "L": L}
    return eval(right, {**public, **sizes, **names})[0]


def family(
    decay_of_head: Callable[[Tensor], Tensor] | None = None,
    *,
    as_g: bool = False,
    start: bool = False,
) -> Callable[[str], None]:
    """A row of fla: the decay is the gate g, or a function of the head (as_g: given as g)."""

    def check(right: str) -> None:
        x = tensors()
        q, k, v, g = (x[name] for name in "qkvg")
        decay = g.exp() if decay_of_head is None else decay_of_head(torch.arange(H))
        if as_g:
            x["g"] = decay.log()
        decay = decay.expand(B, T, H)
        expected = plain(q, k, v, decay, torch.ones_like(g), scale=K**-0.5)
        if start:
            x["S"] = torch.randn(B, H, K, V)
            reach = decay.cumprod(1)[..., None] * q * K**-0.5
            expected = expected + torch.einsum("bthk,bhkv->bthv", reach, x["S"])
        torch.testing.assert_close(run(right, **x), expected)

    return check


def mlstm(input_gate: Callable[[Tensor], Tensor], divide: bool) -> Callable[[str], None]:
    """A row of mlstm_kernels: the same function, head first."""

    def check(right: str) -> None:
        x = tensors()
        q, k, v, i, f = (x[name] for name in "qkvif")
        expected = plain(q, k, v, f.sigmoid(), input_gate(i), scale=K**-0.5, divide=divide)
        head_first = {name: y.transpose(1, 2) for name, y in x.items()}
        torch.testing.assert_close(run(right, **head_first), expected)

    return check


def step(right: str) -> None:
    x = {name: y[:, 0] for name, y in tensors().items()}
    q, k, v, i, f = (x[name] for name in "qkvif")
    c = torch.randn(B, H, K, V)
    n, m = torch.randn(B, H, K), torch.randn(B, H, 1)
    decay, write = f.sigmoid()[..., None], i.exp()[..., None]
    n1 = decay * n * m.exp() + write * k
    c1 = decay[..., None] * c * m[..., None].exp() + (write * k)[..., None] * v[..., None, :]
    q1 = q * K**-0.5
    expected = (
        torch.einsum("bhk,bhkv->bhv", q1, c1) / (q1 * n1).sum(-1).abs().clamp(min=1)[..., None]
    )
    gates = {"i": i[..., None], "f": f[..., None]}
    torch.testing.assert_close(run(right, **{**x, **gates, "c": c, "n": n, "m": m}), expected)


def state_space(right: str) -> None:
    x = torch.randn(B, T, H, V)
    dt, A = torch.rand(B, T, H) + 0.01, -torch.rand(H)
    B_, C_ = torch.randn(2, B, T, G, K)
    heads = [h // (H // G) for h in range(H)]  # the group that each head reads
    expected = plain(C_[:, :, heads], B_[:, :, heads], x, (A * dt).exp(), dt, scale=1.0)
    torch.testing.assert_close(run(right, x=x, dt=dt, A=A, B=B_, C=C_), expected)


CHECKS = {
    "chunk_linear_attn(q, k, v, normalize=False)": family(torch.ones_like),
    "chunk_simple_gla(q, k, v, g)": family(),
    "chunk_simple_gla(q, k, v, g_gamma=g)": family(lambda h: (-0.1 - h / 10).exp(), as_g=True),
    "chunk_retention(q, k, v)": family(lambda h: 1 - 1 / 2 ** (5 + h)),
    "chunk_lightning_attn(q, k, v, layer_idx=l, num_layers=L)": family(
        lambda h: (-8 * h / H * (L - l) / L).exp()
    ),
    "chunk_simple_gla(q, k, v, g, initial_state=S)": family(start=True),
    "mlstm_chunkwise__xl_chunk(q, k, v, i, f)": mlstm(torch.exp, divide=True),
    "mlstm_siging_chunkwise__xl_chunk(q, k, v, i, f)": mlstm(torch.sigmoid, divide=True),
    "mlstm_siging_chunkwise__xl_chunk(q, k, v, i, f, normalize=False)": mlstm(torch.sigmoid, False),
    "mlstm_recurrent_step__triton(q, k, v, i, f, c, n, m)": step,
    "mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size)": state_space,
}


def test_every_translation_has_its_check() -> None:
    assert [left for left, _ in ROWS] == list(CHECKS)


@pytest.mark.parametrize(("left", "right"), ROWS)
def test_translation_computes_the_same(left: str, right: str) -> None:
    torch.set_default_dtype(torch.float64)  # of the constants that the rows make
    try:
        CHECKS[left](right)
    finally:
        torch.set_default_dtype(torch.float32)
