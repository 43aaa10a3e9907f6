"""The xLSTM language model in the layout of xLSTM 7B (Beck et al., arXiv 2503.13427).

    x = embedding[tokens]
    every block:   x = x + MLSTMLayer(RMSNorm(x))          mixes tokens, the only part with a state
                   x = x + SwiGLU(RMSNorm(x))              mixes channels
    logits = cap tanh(W_head RMSNorm(x) / cap)

The same code reads a sequence, x (B, T, d), and a single token, x (B, d). Dimensions: B batch,
T tokens, d hidden size, H heads, K q/k head dim, V v head dim.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tfla
from tfla import dispatch
from tfla.linear import PreciseLinear, is_plain
from tfla.spec import BackendName
from tfla.xlstm.arguments import integer
from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.generate import Generation, Prompts, Stream, generate

CLOSED = 1e4  # a gate at +-1e4 passes exactly 1 or exactly 0 in fp32
Mixer = Callable[[XLSTMConfig], nn.Module]  # makes the part of a block that mixes tokens


class MLSTMLayer(nn.Module):
    """The part of a block that mixes tokens (Beck et al., arXiv 2503.13427).

        q, k, v, o = W x        i, f = cap tanh((W' x + b) / cap)
        y = W_out (sigmoid(o) * Norm(mlstm(q, k, v, i, f)))

    Norm is a layer norm over the V channels of each head, with one weight per channel and no bias.
    i and f are computed in fp32 in a model of any dtype: an error in f acts on all later tokens.

    Args:
        config: its widths, heads, input gate, cap of the gates and eps of the norm.

    Example:
        >>> import torch
        >>> from tfla.xlstm import MLSTMLayer, XLSTMConfig
        >>> config = XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2)
        >>> y, state = MLSTMLayer(config)(torch.randn(3, 100, 64), output_final_state=True)
        >>> y.shape, state.C.shape
        (torch.Size([3, 100, 64]), torch.Size([3, 2, 16, 32]))
    """

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = [config.qk_dim, config.qk_dim, config.v_dim, config.v_dim]
        self.qkvo = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.gates = PreciseLinear(config.hidden_size, 2 * config.num_heads)  # rows: i, then f
        self.norm_weight = nn.Parameter(torch.ones(config.v_dim))
        self.out = nn.Linear(config.v_dim, config.hidden_size, bias=False)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Weights 0, input bias -10, forget bias from 3 to 6 over the heads: long memories, filled
        slowly. Source: arXiv 2503.13427. As nn.Linear draws them, a head forgets in two tokens."""
        H = self.config.num_heads
        self.gates.weight.zero_()
        if self.gates.bias is not None:
            self.gates.bias[:H] = -10.0
            self.gates.bias[H:] = torch.linspace(3.0, 6.0, H, device=self.gates.bias.device)

    def forward(
        self,
        x: Tensor,
        state: tfla.State | None = None,
        *,
        active: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, tfla.State | None]:
        """Read a sequence by ``tfla.mlstm``, or one token by ``tfla.mlstm_step``.

        Args:
            x: (B, T, d) or, for one token, (B, d), in the dtype of the parameters.
            state: of B rows (N with ``cu_seqlens``); None: nothing has been read. One token needs
                a state.
            active: (B, T) or (B,) bool; where it is False the state stays as it is.
            options: further arguments of the function that is called, such as
                ``output_final_state``, ``cu_seqlens``, ``inplace`` or ``backend``.

        Returns:
            y: shaped as x; and the state that the function returns.

        Raises:
            TypeError, ValueError, RuntimeError: as the function that is called.
        """
        config = self.config
        q, k, v, o = self.qkvo(x).split(self.widths, -1)
        q, k, v = (y.unflatten(-1, (config.num_heads, -1)) for y in (q, k, v))  # (..., H, K or V)
        i, f = self.gate_preactivations(x, active)  # (..., H)
        gate = config.input_gate
        if x.dim() == 3:
            h, state = tfla.mlstm(q, k, v, i, f, input_gate=gate, initial_state=state, **options)
        else:
            h, state = tfla.mlstm_step(q, k, v, i, f, state, input_gate=gate, **options)  # type: ignore[arg-type]
        if kernels := fused(x, self.norm_weight):
            return self.out(kernels.head_norm(h, o, self.norm_weight, config.norm_eps)), state
        h = F.layer_norm(h, (config.V,), eps=config.norm_eps).flatten(-2) * self.norm_weight
        return self.out(torch.sigmoid(o) * h), state

    def gate_preactivations(self, x: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """i and f (..., H), soft-capped, in fp32 (fp64 for fp64 x), also under autocast; closed
        where `active` (...) is False."""
        cap = self.config.gate_soft_cap
        if x.dim() == 2 and (kernels := fused_with(x, self.gates, PreciseLinear)):
            # A library's product of few rows waits.
            weight, bias = self.gates.weight, self.gates.bias
            return kernels.gates(x, weight, bias, cap, active, CLOSED).chunk(2, -1)
        y = self.gates(x)
        y = y.to(torch.promote_types(y.dtype, torch.float32))  # an adapter may answer in less
        i, f = soft_cap(y, cap).chunk(2, -1)
        if active is not None:
            idle = ~active[..., None]
            i, f = i.masked_fill(idle, -CLOSED), f.masked_fill(idle, CLOSED)
        return i, f


class SwiGLU(nn.Module):
    """The part of a block that mixes channels (Shazeer, arXiv 2002.05202).

        y = W_down (silu(g) * u)        g, u = W_up x

    x and y are (..., d); g and u have ``config.ffn_dim`` channels. There are no biases.
    """

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.ffn_dim, bias=False)  # rows: g, then u
        self.down = nn.Linear(config.ffn_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        g, u = self.up(x).chunk(2, -1)
        if kernels := fused(g, u):
            return self.down(kernels.swiglu(g, u))
        return self.down(F.silu(g) * u)


class Block(nn.Module):
    """One block of the model: the unit to checkpoint or to shard.

        x = x + MLSTMLayer(RMSNorm(x))
        x = x + SwiGLU(RMSNorm(x))

    Args:
        config: of the model.
        mixer: makes the module in place of the MLSTMLayer, to compare with others. It is called
            like an MLSTMLayer, and its matrix that writes to x is named ``out``.
    """

    def __init__(self, config: XLSTMConfig, mixer: Mixer = MLSTMLayer) -> None:
        super().__init__()
        self.norm_mlstm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlstm = mixer(config)
        self.norm_ffn = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x: Any, state: tfla.State | None = None, **options: Any) -> tuple[Any, Any]:
        """The block's output and its state; `state` and `options` as for ``MLSTMLayer``.

        Args:
            x: (B, T, d) or (B, d); or a pair of such tensors whose sum is the input. Then the
                output is such a pair too, and the next norm adds it up in the same pass.
        """
        pair = isinstance(x, tuple)
        x, y = add_norm(x, self.norm_mlstm)
        y, state = self.mlstm(y, state, **options)
        x, y = add_norm((x, y), self.norm_ffn)
        y = self.ffn(y)
        return (x, y) if pair else x + y, state


class XLSTM(nn.Module):
    """An xLSTM language model in the layout of xLSTM 7B (Beck et al., arXiv 2503.13427).

        x = embedding[tokens]                              (B, T, d)
        x = block(x)                                       ``num_layers`` times, see ``Block``
        logits = cap tanh(W_head RMSNorm(x) / cap)         (B, T, vocab)

    Sequences may be cut anywhere: ``model(a)`` and then ``model(b, state)`` equals ``model(ab)``,
    in values and gradients. The parameters are drawn by ``reset_parameters``.

    Args:
        config: the shape of the model.
        mixer: makes the part of each block that mixes tokens; see ``Block``.

    Example:
        >>> import torch
        >>> from tfla.xlstm import XLSTM, XLSTMConfig
        >>> model = XLSTM(XLSTMConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2))
        >>> tokens = torch.randint(256, (3, 100))
        >>> logits, _ = model(tokens)                                     # (3, 100, 256)
        >>> logits, state = model(tokens[:, :50], output_state=True)      # a part of it ...
        >>> logits, state = model.step(tokens[:, 50], state)              # ... one more: (3, 256)
        >>> out = model.generate(tokens, 20, temperature=0.8, top_k=40, seed=0)
        >>> out.tokens.shape
        torch.Size([3, 20])
    """

    def __init__(self, config: XLSTMConfig, mixer: Mixer = MLSTMLayer) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, mixer) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_load_state_dict_post_hook(_tie_after_loading)
        self._tie()
        self.reset_parameters()

    def _tie(self) -> None:
        if self.config.tie_embeddings and self.head.weight is not self.embedding.weight:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What to(), to_empty() and the like come down to: the last makes parameters anew, one for
        each place that a shared one is in."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's global generator.

        Matrices that read the residual stream: normal with std sqrt(2 / (5 d)). The two that write
        to it, `out` and `down`: std 2 / (layers sqrt(d)). Gates: see `MLSTMLayer.reset_gates`. Norm
        weights 1.
        Source: arXiv 2503.13427.
        """
        d = self.config.hidden_size
        for name, parameter in self.named_parameters():
            if ".gates." in name:
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.endswith(("mlstm.out.weight", "ffn.down.weight")):
                parameter.normal_(std=2 / (self.config.num_layers * math.sqrt(d)))
            else:
                parameter.normal_(std=math.sqrt(2 / (5 * d)))
        for module in self.modules():
            if isinstance(module, MLSTMLayer):
                module.reset_gates()

    def forward(
        self,
        tokens: Tensor,
        state: Sequence[tfla.State] | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        backend: BackendName | None = None,
    ) -> tuple[Tensor, tuple[tfla.State, ...] | None]:
        """Logits for the token after each token.

        Args:
            tokens: (B, T) int64 or int32 token ids.
            state: what the model has read so far, one ``tfla.State`` a layer; None: nothing.
            output_state: also return the state after the last token.
            cu_seqlens: (N + 1,) offsets of N sequences packed along T, with B = 1; states then
                have N rows. See ``tfla.mlstm``.
            backend: None, "reference" or "triton", for ``tfla.mlstm``.

        Returns:
            logits: (B, T, vocab) fp32 (fp64 in an fp64 model), and the state or None.

        Raises:
            TypeError, ValueError: naming the argument, what came and what is expected.
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens must be a tensor (B, T); got {type(tokens).__name__}.")
        if tokens.dim() != 2:
            raise ValueError(
                f"tokens must be (B, T); got {tuple(tokens.shape)}. One sequence is tokens[None]."
            )
        x, after = self.hidden(
            tokens, state, output_final_state=output_state, cu_seqlens=cu_seqlens, backend=backend
        )
        return self.logits(x), after if output_state else None

    def step(
        self,
        tokens: Tensor,
        state: Sequence[tfla.State],
        inplace: bool = False,
        *,
        active: Tensor | None = None,
        slots: Tensor | None = None,
        backend: BackendName | None = None,
    ) -> tuple[Tensor, tuple[tfla.State, ...]]:
        """Read one token per sequence, through ``tfla.mlstm_step``.

        Args:
            tokens: (B,) int64 or int32 token ids.
            state: of B rows, as ``forward`` and ``init_state`` return it.
            inplace: update `state` itself and return it; needs torch.no_grad().
            active: (B,) bool; rows with False keep their state exactly, and their logits mean
                nothing. None: all are active.
            slots: (B,) the rows of a larger in-place state that the batch uses; see
                ``tfla.mlstm_step``.
            backend: None, "reference" or "triton", for ``tfla.mlstm_step``.

        Returns:
            logits: (B, vocab) fp32 (fp64 in an fp64 model) for the next token, and the state after
            this one.

        Raises:
            TypeError, ValueError: naming the argument, what came and what is expected.
        """
        if tokens.dim() != 1:
            raise ValueError(
                f"tokens must be (B,), one token per sequence; got {tuple(tokens.shape)}."
            )
        if active is not None and (active.shape != tokens.shape or active.dtype != torch.bool):
            raise ValueError(
                f"active must be ({len(tokens)},) bool; got {tuple(active.shape)} {active.dtype}."
            )
        if state is None:
            raise ValueError(
                "step needs a state: take that of forward(..., output_state=True) or init_state(B)."
            )
        x, after = self.hidden(
            tokens, state, active=active, inplace=inplace, slots=slots, backend=backend
        )
        return self.logits(x), after

    def hidden(
        self, tokens: Tensor, state: Sequence[tfla.State] | None = None, **options: Any
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """What ``logits`` reads: (B, T, d) for tokens (B, T), (B, d) for (B,); and the states."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32; got {tokens.dtype}.")
        if state is not None and len(state) != self.config.num_layers:
            raise ValueError(
                f"state must be {self.config.num_layers} tfla.State, one a layer; got {len(state)}."
            )
        states = [None] * len(self.blocks) if state is None else state
        x: Any = self.embedding(tokens)
        # A hook on a block is to see x, not a pair whose sum is x.
        pairs = fused(x, x) and all(is_plain(block, Block) for block in self.blocks)
        x = (x, None) if pairs else x
        after = []
        for block, before in zip(self.blocks, states, strict=True):
            x, new = block(x, before, **options)
            after.append(new)
        return add_norm(x, self.norm)[1], tuple(after)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., vocab) of hidden states (..., d), soft-capped, in fp32 (fp64 for fp64 x)."""
        y = self.head(x)
        dtype = torch.promote_types(y.dtype, torch.float32)
        return soft_cap(y.to(dtype), self.config.logit_soft_cap)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None
    ) -> tuple[tfla.State, ...]:
        """The state before the first token: zeros, on the model's device.

        Args:
            batch_size: number of sequences, the rows of the state.
            dtype: of C and n; None: fp32 (fp64 in an fp64 model). torch.bfloat16 halves the memory
                of decoding. m is fp32 (fp64 in an fp64 model) in any case.

        Returns:
            One ``tfla.State`` a layer; n and m are None with the sigmoid input gate.
        """
        batch_size = integer("batch_size", batch_size, 0, 2**63 - 1)
        config, weight = self.config, self.embedding.weight
        N, H, K, V = batch_size, config.num_heads, config.K, config.V
        full = torch.promote_types(weight.dtype, torch.float32)
        states = []
        for _ in range(config.num_layers):
            C = torch.zeros(N, H, K, V, dtype=dtype or full, device=weight.device)
            rest = (C.new_zeros(N, H, K), C.new_zeros(N, H, dtype=full))
            states.append(tfla.State(C, *(rest if config.normalize else (None, None))))
        return tuple(states)

    def generate(self, prompts: Prompts, max_new_tokens: int, **options: Any) -> Generation:
        """Continue prompts, and return all new tokens at the end.

        Args:
            prompts: (B, T) token ids, or a list of B prompts of different lengths.
            max_new_tokens: at least 1.
            options: temperature, top_k, top_p, seed, stop, state, state_dtype and backend, which
                ``tfla.xlstm.Stream`` describes with the errors.

        Returns:
            A ``tfla.xlstm.Generation``: the tokens, their number in each row, and the state.
        """
        return generate(self, prompts, max_new_tokens, **options)

    def stream(self, prompts: Prompts, max_new_tokens: int, **options: Any) -> Stream:
        """Continue prompts token by token: a ``tfla.xlstm.Stream``, an iterator of (B,) int64.

        Arguments: as for ``generate``.
        """
        return Stream(self, prompts, max_new_tokens, **options)


def _tie_after_loading(model: XLSTM, keys: Any) -> None:
    """load_state_dict(assign=True) also makes a parameter for each name."""
    model._tie()


def fused(x: Tensor, weight: Tensor) -> Any:
    """The kernels that do what lies between matrix products in one pass, with less rounding; None
    where torch has to do it: for gradients, in graphs, under autocast, without a GPU."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cuda"):
        return None
    known = dispatch.pick_backend(None, x) == "triton"
    return importlib.import_module("tfla.kernels.pointwise") if known else None


def fused_with(x: Tensor, module: nn.Module, kind: type[nn.Module]) -> Any:
    """The same kernels where one of them may read the weight of a module in place of calling it."""
    kernels = fused(x, x)
    if kernels is None or not is_plain(module, kind):
        return None
    return kernels if module.weight.dtype == x.dtype else None


def add_norm(x: Any, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """x, or the sum of the pair x, of which the second may be None; and its norm."""
    x, y = x if isinstance(x, tuple) else (x, None)
    if y is not None and (kernels := fused_with(x, norm, nn.RMSNorm)):
        return kernels.add_norm(x, y, norm.weight, norm.eps)
    x = x if y is None else x + y
    return x, norm(x)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap): x when small, never beyond +-cap. None: x."""
    return x if cap is None else cap * torch.tanh(x / cap)
