"""The blocks of a transformers xLSTM without gradients: a prompt in fewer passes over memory, and a
token of all blocks in one CUDA graph.

A block of transformers makes about 140 calls of torch, and a token of a large model at a small
batch waits for the host that makes them. ``BlockInference`` is the same block, over the same
modules and weights, in about 40 calls, on a GPU 17, most of them kernels of
``tfla.kernels.pointwise``. Linear layers are called, so what hangs on them (adapters, hooks,
quantized weights) acts. Norms are read, so where anything hangs on one of those or on what is
between, the block computes as transformers has it. ``TokenGraph`` replays these calls for all
blocks at once, where nothing at all hangs on them.

Dimensions: B batch, T tokens, d hidden size, H heads, K q/k head dim, V v head dim.
"""

from __future__ import annotations

import functools
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfla import _compat
from tfla.gates import InputGate
from tfla.integrations import head_first
from tfla.integrations.head_first import States
from tfla.linear import is_plain, precise
from tfla.xlstm.model import fused, soft_cap


@dataclass(frozen=True)
class Memory:
    """The part of a layer that remembers: its mLSTM.

    Args:
        input_gate, normalize: as of ``tfla.mlstm``.
    """

    input_gate: InputGate
    normalize: bool

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        states: States | None,
        keep: Tensor | None,
        *,
        output_states: bool = True,
    ) -> tuple[Tensor, States | None]:
        """h (B, H, T, V) and the states after the last token.

        Args:
            q, k, v, i, f: (B, H, T, K), v (B, H, T, V), gates (B, H, T).
            states: before the first token; None: none. Those of a single token are updated where
                they lie and returned, if there are no gradients.
            keep: (B, T), False for tokens that leave the states as they were. None: all count.
            output_states: whether there are states to be returned.
        """
        if q.shape[2] == 1 and states is not None and not torch.is_grad_enabled():
            token = (q[:, :, 0], k[:, :, 0], v[:, :, 0], i[:, :, 0], f[:, :, 0])
            h, states = self.step(*token, states, keep)
            return h[:, :, None], states
        if keep is not None:
            i, f = head_first.close(i, f, keep)
        before = (None, None, None) if states is None else states
        return head_first.sequence(
            q,
            k,
            v,
            i,
            f,
            *before,
            input_gate=self.input_gate,
            normalize=self.normalize,
            states=output_states,
        )

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        states: States,
        keep: Tensor | None,
    ) -> tuple[Tensor, States]:
        """The same of one token, without its axis: h (B, H, V), of gates (B, H)."""
        i, f = i[..., None], f[..., None]
        if keep is not None:
            i, f = head_first.close(i, f, keep)
        return head_first.step(
            q,
            k,
            v,
            i,
            f,
            *states,
            input_gate=self.input_gate,
            normalize=self.normalize,
            inplace=True,
        )


@dataclass(frozen=True)
class BlockInference:
    """A block without gradients, if nothing has been hung on it since it was patched.

    Args:
        block: an xLSTMBlock of transformers, or an mLSTMBlock of xlstm.
        memory: that of its layer.
        kinds: the classes that the modules had whose forward is not called.
    """

    block: Any
    memory: Memory
    kinds: tuple[type[nn.Module], ...]

    @staticmethod
    def of(block: Any, memory: Memory) -> BlockInference | None:
        """None: a block whose forward is somebody's own, or whose norms have biases."""
        norms = block.norm_mlstm, block.norm_ffn, block.mlstm_layer.multihead_norm
        if any(norm.weight is None or norm.bias is not None for norm in norms):
            return None
        kinds = tuple(type(module) for module in _passed_over(block))
        return BlockInference(block, memory, kinds) if "forward" not in vars(block) else None

    def serves(self, x: Tensor) -> bool:
        """Can tokens x (B, T, d) be read this way, now?"""
        if x.dim() != 3 or x.shape[1] == 0 or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled(x.device.type) or self.block.norm_ffn.weight.dtype != x.dtype:
            return False
        return all(map(is_plain, _passed_over(self.block), self.kinds))

    def is_recordable(self) -> bool:
        """Is there nothing in the block that could act in one call and not in another?"""
        if _compat.is_hooked(self.block):
            return False
        if not all(map(is_plain, _passed_over(self.block), self.kinds)):
            return False
        return all(is_plain(module, nn.Linear) for module in _called(self.block))

    def __call__(
        self, x: Tensor, states: States | None, keep: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """x (B, T, d) and the states after it; see ``Memory`` for states and `keep`."""
        if x.shape[1] > 1 or states is None:
            return self._read(x, states, keep)
        token, states = self._read(
            x[:, 0], states, keep
        )  # torch multiplies matrices in fewer calls
        return token[:, None], states

    def _read(
        self, x: Tensor, states: States | None, keep: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """The same for tokens (B, T, d), or one (B, d) whose states are updated where they lie."""
        block, norm = self.block, self.block.norm_mlstm
        y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        y, states = self._mix(block.mlstm_layer, y, states, keep)
        norm = block.norm_ffn
        if kernels := fused(x, norm.weight):
            x, y = kernels.add_norm(x, y, norm.weight, norm.eps)
        else:
            x = x + y
            y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        return x + self._feed(block.ffn, y), states

    def _mix(
        self, layer: Any, x: Tensor, states: States | None, keep: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """The mixer of tokens: (B, T, d) or (B, d), and the states."""
        H, norm = layer.config.num_heads, layer.multihead_norm
        if hasattr(layer, "q"):
            q, k, v, o = layer.q(x), layer.k(x), layer.v(x), layer.ogate_preact(x)
        else:
            widths = (layer.qk_dim, layer.qk_dim, layer.v_dim, layer.v_dim)
            q, k, v, o = layer.qkv_opreact(x).split(widths, -1)
        q, k, v = (y.unflatten(-1, (H, -1)) for y in (q, k, v))
        i, f = self._gates(layer, x)
        if x.dim() == 3:
            q, k, v, i, f = (y.transpose(1, 2) for y in (q, k, v, i, f))
            h, states = self.memory(q, k, v, i, f, states, keep)
            h = h.transpose(1, 2)
        else:
            assert states is not None
            h, states = self.memory.step(q, k, v, i, f, states, keep)
        if kernels := fused(x, norm.weight):
            return layer.out_proj(kernels.head_norm(h, o, norm.weight, norm.eps)), states
        h = F.layer_norm(h, h.shape[-1:], eps=norm.eps).flatten(-2) * norm.weight
        return layer.out_proj(torch.sigmoid(o) * h), states

    def _gates(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """i and f (B, T, H) or (B, H), soft-capped, in fp32 (fp64)."""
        cap = layer.config.gate_soft_cap
        single = hasattr(layer, "igate_preact")
        modules = [layer.igate_preact, layer.fgate_preact] if single else [layer.ifgate_preact]
        plain = all(is_plain(y, nn.Linear) for y in modules)
        kernels = fused(x, modules[0].weight) if plain and x.dim() == 2 else None
        if kernels and all(y.bias is not None for y in modules):
            out = [kernels.gates(x, y.weight, y.bias, cap, None, 0.0) for y in modules]
        else:
            out = [precise(x, y.weight, y.bias) if plain else y(x) for y in modules]
            whole = torch.cat(out, -1) if single else out[0]
            out = [soft_cap(whole.to(torch.promote_types(x.dtype, torch.float32)), cap)]
        i, f = out if len(out) == 2 else out[0].chunk(2, -1)
        return i, f

    @staticmethod
    def _feed(ffn: Any, x: Tensor) -> Tensor:
        if hasattr(ffn, "proj_up_gate"):
            g, u = ffn.proj_up_gate(x), ffn.proj_up(x)
        else:
            g, u = ffn.proj_up_gate_z(x).chunk(2, -1)
        if kernels := fused(g, u):
            return ffn.proj_down(kernels.swiglu(g, u))
        return ffn.proj_down(F.silu(g) * u)


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


def _called(block: Any) -> list[nn.Module]:
    """The modules whose forward is called."""
    inside = (*block.mlstm_layer.children(), *block.ffn.children())
    activations = ("ogate_act_fn", "act_fn")  # which are computed with what is around them
    parts = (block.mlstm_layer, block.ffn)
    other = [getattr(part, name, None) for part in parts for name in activations]
    known = {id(module) for module in (*_passed_over(block), *other)}
    return [module for module in inside if id(module) not in known]


class StackInference:
    """All blocks of a stack, as they were when this was made.

    Args:
        blocks: of the stack.
        steps: what each was patched with, None where another's forward was in the way.

    Attributes:
        recordable: whether nothing in them could act in one call and not in another.
    """

    def __init__(self, blocks: nn.ModuleList, steps: Sequence[BlockInference | None]) -> None:
        self.blocks = blocks
        self.steps = [step for step in steps if step is not None]
        self._watch = _compat.ModuleWatch(list(blocks.modules()))
        self.recordable = len(self.steps) == len(blocks) and all(
            step.block is block and step.is_recordable() and is_forward_of(block, step)
            for step, block in zip(self.steps, blocks, strict=True)
        )

    def is_current(self, blocks: nn.ModuleList) -> bool:
        """Are these the blocks, with the same modules, weights at the same addresses, and hooks?"""
        return blocks is self.blocks and self._watch.unchanged()

    def __call__(self, x: Tensor, states: Sequence[States]) -> Tensor:
        """One token x (B, 1, d) behind all blocks; the states are updated where they lie."""
        for step, one in zip(self.steps, states, strict=True):
            x, _ = step(x, one, None)
        return x


def is_forward_of(block: nn.Module, step: BlockInference) -> bool:
    """Is the block's forward still that which `step` was given to?"""
    forward = vars(block).get("forward")
    return isinstance(forward, partial) and forward.keywords.get("step") is step


class TokenGraph:
    """A token of all blocks as a CUDA graph, for the states of one cache.

    The first token of a cache is read block by block, which leaves no kernel to be compiled. The
    second is recorded. From then on a token is a copy into the graph's input, the graph, and a copy
    of its output. The graph reads weights and states where they lie, so both may be changed in
    place. Another batch size or dtype, other state tensors, another module, weight or hook: it is
    recorded anew, after a token block by block.

    It lives and dies with its cache, and keeps no weights alive. A copy of it is a new one: the
    graph updates the states of the original.
    """

    def __init__(self) -> None:
        self._stack: Callable[[], StackInference | None] = lambda: None
        self._states: list[States] = []
        self._x = torch.empty(0)
        self._recorded: tuple[Callable[[], object], Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> TokenGraph:
        return TokenGraph()

    def __reduce__(self) -> Any:
        return TokenGraph, ()

    def __call__(self, x: Tensor, stack: StackInference, states: Sequence[States]) -> Tensor | None:
        """x (B, 1, d) behind all blocks; None: it has not been read, and is to be read by each."""
        states = list(states)
        if not self._fits(x, stack, states):
            self._recorded = None
            self._stack, self._states = weakref.ref(stack), states
            with torch.inference_mode(False), torch.no_grad():  # to be written to in either mode
                self._x = torch.empty_like(x)
            return None
        if self._recorded is None:
            try:
                self._recorded = record(partial(stack, self._x, states), x.device)
            except RuntimeError as error:
                stack.recordable = False
                warnings.warn(
                    "tfla cannot record a token of this model as a CUDA graph and reads tokens "
                    f"block by block, which is slower: {error}",
                    stacklevel=2,
                )
                return None
        replay, y = self._recorded
        self._x.copy_(x)
        replay()
        return y.clone()

    def _fits(self, x: Tensor, stack: StackInference, states: list[States]) -> bool:
        known = self._x
        if self._stack() is not stack or len(states) != len(self._states):
            return False
        if (x.shape, x.dtype, x.device) != (known.shape, known.dtype, known.device):
            return False
        return all(map(operator.is_, states, self._states))


def can_record(x: Tensor) -> bool:
    """May what is computed from x be recorded: on a GPU that our kernels serve, with nobody who
    traces, records or looks at each operation?"""
    if fused(x, x) is None or torch.cuda.is_current_stream_capturing():
        return False
    return not (_compat.dispatch_modes() or _compat.functorch_transforms())


_recording = threading.Lock()  # a capture is ended by what another one begins with


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """To record on. Products of matrices keep 32 MiB for each stream that they were on."""
    return torch.cuda.Stream(device)


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """Record run(), which is not executed: what executes it, and where its result will lie.

    torch.cuda.graph would first wait for the device and give all free memory back to it.
    """
    with _recording, torch.cuda.stream(_stream(device)):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            y = run()
        finally:
            graph.capture_end()
    return graph.replay, y
