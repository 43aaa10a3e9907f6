"""One token through a block of a transformers xLSTM, in few operations.

A step of a large model at a small batch waits for the host: a block of transformers makes about 140
calls of torch for one token. This is the same block, over the same modules and weights, in about 40
(on a GPU 20, most of them kernels of ``tfla.kernels.pointwise``). Linear layers are called, so what
hangs on them (adapters, hooks, quantized weights) acts. Norms are read, so where anything hangs on
one of those or on what is between, the block computes as transformers has it.

Dimensions: B batch, d hidden size, H heads, V v head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfla.gates import InputGate
from tfla.integrations import head_first
from tfla.integrations.head_first import States
from tfla.linear import is_plain
from tfla.xlstm.model import fused, soft_cap


@dataclass(frozen=True)
class Gate:
    """What the memory of a layer is computed with."""

    input_gate: InputGate
    normalize: bool


@dataclass(frozen=True)
class BlockStep:
    """Reads single tokens for a block, if nothing has been hung on it since it was patched.

    Args:
        block: an xLSTMBlock of transformers, or an mLSTMBlock of xlstm.
        gate: of its memory.
        kinds: the classes that the modules had whose forward is not called.
    """

    block: Any
    gate: Gate
    kinds: tuple[type[nn.Module], ...]

    @staticmethod
    def of(block: Any, gate: Gate) -> BlockStep | None:
        """None: a block whose forward is somebody's own, or whose norms have biases."""
        norms = block.norm_mlstm, block.norm_ffn, block.mlstm_layer.multihead_norm
        if any(norm.weight is None or norm.bias is not None for norm in norms):
            return None
        kinds = tuple(type(module) for module in _passed_over(block))
        return BlockStep(block, gate, kinds) if "forward" not in vars(block) else None

    def serves(self, x: Tensor, state: Any) -> bool:
        """Is x (B, 1, d) one token to be read without gradients?"""
        if state is None or x.dim() != 3 or x.shape[1] != 1 or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled(x.device.type) or self.block.norm_ffn.weight.dtype != x.dtype:
            return False
        return all(map(is_plain, _passed_over(self.block), self.kinds))

    def __call__(self, x: Tensor, state: States, keep: Tensor | None) -> tuple[Tensor, States]:
        """x (B, 1, d) and the state after it, in place; rows of x where `keep` (B, 1) is False
        leave the state as it was."""
        block, x = self.block, x[:, 0]
        norm, ffn = block.norm_mlstm, block.ffn
        y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        y, state = self._mix(block.mlstm_layer, y, state, keep)
        norm = block.norm_ffn
        if kernels := fused(x, norm.weight):
            x, y = kernels.add_norm(x, y, norm.weight, norm.eps)
        else:
            x = x + y
            y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        return (x + self._feed(ffn, y))[:, None], state

    def _mix(
        self, layer: Any, x: Tensor, state: States, keep: Tensor | None
    ) -> tuple[Tensor, States]:
        """The mixer of tokens: (B, d) and the state."""
        H, norm = layer.config.num_heads, layer.multihead_norm
        if hasattr(layer, "q"):
            q, k, v, o = layer.q(x), layer.k(x), layer.v(x), layer.ogate_preact(x)
        else:
            widths = (layer.qk_dim, layer.qk_dim, layer.v_dim, layer.v_dim)
            q, k, v, o = layer.qkv_opreact(x).split(widths, -1)
        q, k, v = (y.unflatten(-1, (H, -1)) for y in (q, k, v))
        i, f = (y[..., None] for y in self._gates(layer, x))
        if keep is not None:
            i, f = head_first.close(i, f, keep)
        h, state = head_first.step(
            q,
            k,
            v,
            i,
            f,
            *state,
            input_gate=self.gate.input_gate,
            normalize=self.gate.normalize,
            inplace=True,
        )
        if kernels := fused(x, norm.weight):
            return layer.out_proj(kernels.head_norm(h, o, norm.weight, norm.eps)), state
        h = F.layer_norm(h, h.shape[-1:], eps=norm.eps).flatten(-2) * norm.weight
        return layer.out_proj(torch.sigmoid(o) * h), state

    def _gates(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """i and f (B, H), soft-capped, in fp32 (fp64)."""
        cap = layer.config.gate_soft_cap
        single = hasattr(layer, "igate_preact")
        modules = [layer.igate_preact, layer.fgate_preact] if single else [layer.ifgate_preact]
        kernels = fused(x, modules[0].weight) if all(map(_is_linear, modules)) else None
        if kernels:
            out = [kernels.gates(x, y.weight, y.bias, cap, None, 0.0) for y in modules]
        else:
            full = torch.promote_types(x.dtype, torch.float32)
            whole = torch.cat([y(x) for y in modules], -1) if single else modules[0](x)
            out = [soft_cap(whole.to(full), cap)]
        i, f = out if len(out) == 2 else out[0].chunk(2, -1)
        return i, f

    @staticmethod
    def _feed(ffn: Any, x: Tensor) -> Tensor:
        if hasattr(ffn, "proj_up_gate"):
            return ffn.proj_down(F.silu(ffn.proj_up_gate(x)) * ffn.proj_up(x))
        y = ffn.proj_up_gate_z(x)
        if kernels := fused(y, y):
            return ffn.proj_down(kernels.swiglu(y))
        g, u = y.chunk(2, -1)
        return ffn.proj_down(F.silu(g) * u)


def _is_linear(module: nn.Module) -> bool:
    return is_plain(module, nn.Linear) and module.bias is not None


def _passed_over(block: Any) -> tuple[nn.Module, ...]:
    """The modules whose forward is not called."""
    layer = block.mlstm_layer
    return (
        block.norm_mlstm,
        block.norm_ffn,
        block.ffn,
        layer,
        layer.multihead_norm,
        layer.mlstm_backend,
    )
