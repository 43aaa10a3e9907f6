"""What the tests of the xLSTM share: small models, token ids, and the formulas written out."""

import math

import torch
from torch import Tensor

import tfla
from tfla.xlstm import XLSTM, XLSTMConfig

GATES = ("exp", "sigmoid")
SMALL = XLSTMConfig(vocab_size=23, hidden_size=24, num_layers=2, num_heads=3)


def make(config: XLSTMConfig, dtype: torch.dtype = torch.float64) -> XLSTM:
    """A model whose gates vary from token to token; the initial ones would hide most mistakes."""
    model = XLSTM(config).to(dtype)
    with torch.no_grad():
        for block in model.blocks:
            block.mlstm.gates.weight.normal_()
            block.mlstm.gates.bias.normal_()
            block.mlstm.norm_weight.uniform_(0.5, 1.5)
            block.norm_mlstm.weight.uniform_(0.5, 1.5)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randint(SMALL.vocab_size, shape)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def same_state(a: tuple[tfla.State, ...], b: tuple[tfla.State, ...]) -> None:
    """Up to the gauge m, in which states may differ."""
    for x, y in zip(a, b, strict=True):
        if x.m is None:
            assert x.n is None and y.n is None and y.m is None
            close(x.C, y.C)
        else:
            close(x.C * x.m.exp()[..., None, None], y.C * y.m.exp()[..., None, None])
            close(x.n * x.m.exp()[..., None], y.n * y.m.exp()[..., None])


def plain_layer(config: XLSTMConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """One mLSTM layer for x (T, d), written out head by head and token by token, no gauge."""
    H, K, V = config.num_heads, config.K, config.V
    q, k, v, o = (w["qkvo.weight"] @ x.T).T.split([H * K, H * K, H * V, H * V], -1)
    gates = 15 * torch.tanh((x @ w["gates.weight"].T + w["gates.bias"]) / 15)
    heads = []
    for head in range(H):
        C, n, rows = torch.zeros(K, V, dtype=x.dtype), torch.zeros(K, dtype=x.dtype), []
        for t in range(len(x)):
            q_t, k_t = (y[t, head * K : (head + 1) * K] for y in (q, k))
            v_t = v[t, head * V : (head + 1) * V]
            i, f = gates[t, head], torch.sigmoid(gates[t, H + head])
            i = i.exp() if config.input_gate == "exp" else torch.sigmoid(i)
            C, n = f * C + i * torch.outer(k_t, v_t), f * n + i * k_t
            h = C.T @ q_t / math.sqrt(K)
            if config.input_gate == "exp":
                h = h / max(abs(n @ q_t) / math.sqrt(K), 1)
            rows.append((h - h.mean()) / (h.var(correction=0) + config.norm_eps).sqrt())
        heads.append(torch.stack(rows))
    return (torch.sigmoid(o) * torch.cat(heads, -1) * w["norm_weight"]) @ w["out.weight"].T


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def plain(model: XLSTM, tokens: Tensor) -> Tensor:
    """The logits (T, vocab) of one text (T,), in the dtype of the model's weights throughout."""
    config, w = model.config, dict(model.named_parameters())
    x = w["embedding.weight"][tokens]
    for layer in range(config.num_layers):
        prefix = f"blocks.{layer}."
        b = {name.removeprefix(prefix): p for name, p in w.items() if name.startswith(prefix)}
        inner = {name.removeprefix("mlstm."): p for name, p in b.items()}
        x = x + plain_layer(config, inner, plain_norm(x, b["norm_mlstm.weight"], config.norm_eps))
        y = plain_norm(x, b["norm_ffn.weight"], config.norm_eps)
        g, u = (y @ b["ffn.up.weight"].T).split(config.ffn_dim, -1)
        x = x + (g * torch.sigmoid(g) * u) @ b["ffn.down.weight"].T
    y = plain_norm(x, w["norm.weight"], config.norm_eps) @ w["head.weight"].T
    return 30 * torch.tanh(y / 30)
