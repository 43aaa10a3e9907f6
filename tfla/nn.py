"""``MLSTM``: layers of mLSTM as a module, to put where ``torch.nn.LSTM`` is.

Dimensions: B batch, T tokens, H heads, K q/k head dim, V v head dim, N packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

import tfla
from tfla import gates
from tfla.linear import PreciseLinear
from tfla.spec import BackendName

MOST_HEADS = 4  # by default, as in the paper's models


@dataclass(frozen=True)
class States:
    """The states of an ``MLSTM``: one ``tfla.State`` for each layer and direction.

    ``state[n]`` is one of them, ``state.layers`` the tuple of all. Iterating over a States, and so
    unpacking it, raises a TypeError: with two layers ``y, (h, c) = layer(x)``, as of an
    ``nn.LSTM``, would otherwise pass unnoticed.

    Attributes:
        layers: layer 0 forward, layer 0 backward (if bidirectional), layer 1 forward, ...
    """

    layers: tuple[tfla.State, ...]  # layer 0 forward, layer 0 backward, layer 1 forward, ...

    def detach(self) -> States:
        """The same states, cut off from the graph (truncated backpropagation through time)."""
        return States(tuple(state.detach() for state in self.layers))

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, n: int) -> tfla.State:
        return self.layers[n]

    def __iter__(self) -> Iterator[NoReturn]:
        raise TypeError(
            "the state of an MLSTM is no (h, c) as that of nn.LSTM, but a matrix memory for each "
            "layer: state[0], state[1], ... or state.layers. What h[-1] is used for, the output "
            "after the last token, is y[-1], with batch_first=True y[:, -1]; of padded sequences "
            "y[lengths - 1, range(B)] or y[range(B), lengths - 1]; of packed ones, y, lengths = "
            "torch.nn.utils.rnn.pad_packed_sequence(y) first. Of the backward direction it is the "
            "second half of y at token 0."
        )


torch.serialization.add_safe_globals([States])  # torch.load reads it with weights_only=True


class MLSTM(nn.Module):
    r"""One or more layers of mLSTM over sequences, in place of ``torch.nn.LSTM``: arguments in its
    order, tensors in its layout.

    Each layer computes, from its input x_t and per head,

        q, k, v, o = W x_t + b                    i, f = W' x_t + b'
        h_t = mlstm(q, k, v, i, f)_t              see ``tfla.mlstm``; its state is (C, n, m)
        y_t = P (sigmoid(o) * LayerNorm(h_t))     over the V channels of a head; P: see proj_size

    Source: Beck et al., arXiv 2405.04517. Unlike in an LSTM no gate reads the previous output, so
    all tokens are computed at once; the state is a matrix a head instead of two vectors.

    Args:
        input_size: features of x.
        hidden_size: features of the output, H V.
        num_layers: layers, each reading the output of the one before.
        bias: give q, k, v and o a bias. The gates always have one.
        batch_first: x is (B, T, input_size) and y likewise; False: (T, B, input_size).
        dropout: in training, set this share of each layer's outputs but the last's to zero.
        bidirectional: a second set of layers reads each sequence from its end; outputs are
            concatenated, the forward half first.
        proj_size: if not 0, features of the output instead of hidden_size (of each direction).
        num_heads: H; must divide hidden_size and qk_size. None: 4, or the most below that do.
        qk_size: H K; None: hidden_size.
        input_gate: "exp" or "sigmoid", see ``tfla.mlstm``.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.

    Example:
        >>> import torch, tfla.nn
        >>> layer = tfla.nn.MLSTM(10, 32, 2, batch_first=True)
        >>> x = torch.randn(3, 50, 10)
        >>> y, state = layer(x)                                  # y: (3, 50, 32)
        >>> more, state = layer(torch.randn(3, 1, 10), state)    # and on from there
        >>> last = y[:, -1]                                      # where nn.LSTM has h[-1]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        num_heads: int | None = None,
        qk_size: int | None = None,
        input_gate: gates.InputGate = "exp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        qk_size = hidden_size if qk_size is None else qk_size
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        sizes |= {"qk_size": qk_size} | ({} if num_heads is None else {"num_heads": num_heads})
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}.")
        if num_heads is None:
            common = math.gcd(hidden_size, qk_size)
            num_heads = next(n for n in range(MOST_HEADS, 0, -1) if common % n == 0)
        for name, flag in {
            "bias": bias,
            "batch_first": batch_first,
            "bidirectional": bidirectional,
        }.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False; got {flag!r}.")
        for name, value in (("hidden_size", hidden_size), ("qk_size", qk_size)):
            if value % num_heads:
                raise ValueError(
                    f"{name} must be a multiple of num_heads = {num_heads}; got {value}."
                )
        if not isinstance(proj_size, int) or proj_size < 0:
            raise ValueError(f"proj_size must be a whole number, 0 for none; got {proj_size!r}.")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a number from 0 to 1; got {dropout!r}.")
        gates.input_gate(input_gate)
        self.input_size, self.hidden_size, self.num_heads = input_size, hidden_size, num_heads
        self.num_layers, self.bias, self.batch_first = num_layers, bias, batch_first
        self.dropout, self.bidirectional, self.proj_size = dropout, bidirectional, proj_size
        self.qk_size, self.input_gate = qk_size, input_gate
        width = (proj_size or hidden_size) * (1 + bidirectional)
        sources = [input_size] + [width] * (num_layers - 1)
        self.layers = nn.ModuleList(
            _Layer(size, self, device, dtype) for size in sources for _ in range(1 + bidirectional)
        )

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: States | Sequence[tfla.State] | None = None,
        *,
        backend: BackendName | None = None,
    ) -> tuple[Tensor | PackedSequence, States]:
        """Read sequences.

        Args:
            x: (T, B, input_size), with ``batch_first`` (B, T, input_size), (T, input_size) for a
                single one, or a PackedSequence of N, which is computed without padding. In the
                dtype of the parameters, unless under autocast. T = 1 without gradients takes the
                decode step.
            state: one ``tfla.State`` of B (or N) rows for each layer, as this returns it (with
                ``bidirectional``: layer 0 forward, layer 0 backward, layer 1 forward, ...); None:
                nothing has been read.
            backend: None, "reference" or "triton", for ``tfla.mlstm``.

        Returns:
            y: the last layer's outputs, shaped or packed as x; and the state after each sequence.
            The backward direction's is that after reading from end to start. There is no (h, c):
            see ``States``.

        Raises:
            ValueError, TypeError: naming the argument, what came and what is expected.
        """
        directions = 1 + self.bidirectional
        states: list[tfla.State | None] = [None] * len(self.layers)
        if state is not None:
            given = state.layers if isinstance(state, States) else state
            if not isinstance(given, (tuple, list)) or any(isinstance(s, Tensor) for s in given):
                raise TypeError(
                    "state must be what this layer has returned, or a list of tfla.State; got "
                    f"{_kind(given)}. It has no (h, c) as nn.LSTM; None begins with nothing read."
                )
            states = list(given)
        if len(states) != len(self.layers):
            raise ValueError(
                f"state must be {len(self.layers)} tfla.State, one for each layer and direction; "
                f"got {len(states)}."
            )
        data = x.data if isinstance(x, PackedSequence) else x
        if not isinstance(data, Tensor) or not data.is_floating_point():
            got = data.dtype if isinstance(data, Tensor) else type(data).__name__
            raise TypeError(f"x must be a floating point tensor or PackedSequence; got {got}.")
        self._check_dtype(data)
        packing = None
        if isinstance(x, PackedSequence):
            packing = _packing(x)
            y = x.data[packing.gather][None]
            states = [_rows(s, x.sorted_indices) for s in states]
        else:
            y = x if x.dim() == 3 else x[None]
            if x.dim() == 3 and not self.batch_first:
                y = y.transpose(0, 1)
        if y.dim() != 3 or y.shape[-1] != self.input_size:
            raise ValueError(
                f"x must be {'(B, T, ' if self.batch_first else '(T, B, '}{self.input_size}), "
                f"(T, {self.input_size}) or a PackedSequence of these; got {tuple(y.shape)}."
            )
        ends = None if packing is None else packing.cu_seqlens
        after: list[tfla.State] = []
        for first in range(0, len(self.layers), directions):
            if first:
                y = F.dropout(y, self.dropout, self.training)
            outputs = []
            for n in range(first, first + directions):
                backward = n > first
                turned = _turn(y, packing) if backward else y
                out, new = self.layers[n](turned, states[n], ends, backend)
                outputs.append(_turn(out, packing) if backward else out)
                after.append(new)
            y = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if isinstance(x, PackedSequence):
            assert packing is not None
            data = torch.empty_like(y[0]).index_copy(0, packing.gather, y[0])
            packed = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
            return packed, States(tuple(_rows(s, x.unsorted_indices) for s in after))  # type: ignore[misc]
        if x.dim() == 2:
            return y[0], States(tuple(after))
        return (y if self.batch_first else y.transpose(0, 1)), States(tuple(after))

    def flatten_parameters(self) -> None:
        """Nothing: for programs that call it on an ``nn.LSTM``."""

    def _check_dtype(self, x: Tensor) -> None:
        """Before torch's own error, which names a matrix."""
        if torch.is_autocast_enabled(x.device.type if x.device.type != "meta" else "cpu"):
            return
        weight = getattr(self.layers[0].qkvo, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():  # quantised
            return
        if weight.dtype != x.dtype:
            raise TypeError(
                f"x must have the dtype of the layer's parameters, {weight.dtype}; got {x.dtype}. "
                "Convert one of them, x.to(...) or layer.to(...), or call under torch.autocast."
            )

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"bias={self.bias}, batch_first={self.batch_first}, dropout={self.dropout}, "
            f"bidirectional={self.bidirectional}, proj_size={self.proj_size}, "
            f"num_heads={self.num_heads}, qk_size={self.qk_size}, input_gate={self.input_gate!r}"
        )


class _Layer(nn.Module):
    """One layer in one direction: (B, T, size) -> (B, T, hidden_size or proj_size)."""

    def __init__(
        self, size: int, of: MLSTM, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.input_gate = of.num_heads, of.input_gate
        self.widths = [of.qk_size, of.qk_size, of.hidden_size, of.hidden_size]
        self.qkvo = nn.Linear(size, sum(self.widths), bias=of.bias, **at)
        # Rows: i, then f. In fp32: an error in f acts on all later tokens.
        self.gates = PreciseLinear(size, 2 * of.num_heads, **at)
        self.norm_weight = nn.Parameter(torch.ones(of.hidden_size, **at))
        self.norm_bias = nn.Parameter(torch.zeros(of.hidden_size, **at))
        self.proj = None
        if of.proj_size:
            self.proj = nn.Linear(of.hidden_size, of.proj_size, bias=False, **at)
        with torch.no_grad():
            # At first the gates ignore x, and the heads remember for 20 to 400 tokens.
            self.gates.weight.zero_()
            self.gates.bias[: of.num_heads] = 0.0
            self.gates.bias[of.num_heads :] = torch.linspace(3.0, 6.0, of.num_heads, **at)

    def forward(
        self,
        x: Tensor,
        state: tfla.State | None,
        cu_seqlens: Tensor | None,
        backend: BackendName | None,
    ) -> tuple[Tensor, tfla.State]:
        q, k, v, o = self.qkvo(x).split(self.widths, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        i, f = self.gates(x).chunk(2, -1)
        h, after = tfla.mlstm(
            q,
            k,
            v,
            i,
            f,
            input_gate=self.input_gate,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        assert after is not None
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6).flatten(-2)
        y = torch.sigmoid(o) * (h * self.norm_weight + self.norm_bias)
        return (y if self.proj is None else self.proj(y)), after


class _Packing(NamedTuple):
    """Where the tokens of a PackedSequence go when each sequence is to lie in one piece."""

    gather: Tensor  # (sum of T,) rows of .data, sequence after sequence
    mirror: Tensor  # (sum of T,) the same places with each sequence turned round
    cu_seqlens: Tensor  # (N + 1,)


def _packing(x: PackedSequence) -> _Packing:
    """Token t of the j-th longest sequence is row offset[t] + j of .data.

    batch_sizes is on the CPU, so lengths are known without waiting for a device.
    """
    sizes = x.batch_sizes
    at = sizes.device  # and not torch's default one
    N, T = int(sizes[0]), len(sizes)
    lengths = T - torch.searchsorted(sizes.flip(0), torch.arange(N, device=at), right=True)
    ends = F.pad(lengths.cumsum(0), (1, 0))
    sequence = torch.arange(N, device=at).repeat_interleave(lengths)
    t = torch.arange(len(sequence), device=at) - ends[sequence]
    offset = sizes.cumsum(0) - sizes
    gather = offset[t] + sequence
    mirror = ends[sequence] + ends[sequence + 1] - 1 - torch.arange(len(sequence), device=at)
    return _Packing(*(index.to(x.data.device) for index in (gather, mirror, ends)))


def _kind(x: Any) -> str:
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {', '.join(type(y).__name__ for y in x)}"
    return type(x).__name__


def _turn(y: Tensor, packing: _Packing | None) -> Tensor:
    """Each sequence from its end; twice is not at all."""
    return y.flip(1) if packing is None else y[:, packing.mirror]


def _rows(state: tfla.State | None, order: Tensor | None) -> tfla.State | None:
    """The rows of a state in another order."""
    if state is None or order is None:
        return state
    return tfla.State(*(None if t is None else t[order] for t in state))  # type: ignore[arg-type]
