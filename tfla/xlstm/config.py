"""The shape of an xLSTM language model, and what it costs: parameters, FLOPs, bytes of state."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tfla import gates


@dataclass(frozen=True)
class XLSTMConfig:
    """An xLSTM language model in the layout of xLSTM 7B (Beck et al., arXiv 2503.13427).

    Args:
        vocab_size: number of token ids.
        hidden_size: width d of the residual stream.
        num_layers: number of blocks, each an mLSTM layer and a SwiGLU.
        num_heads: H; must divide qk_dim and v_dim.
        qk_dim_factor, v_dim_factor: qk_dim = H K and v_dim = H V over d. The products with d must
            be whole numbers.
        ffn_factor: inner width of the SwiGLU over d; the product is rounded up to a multiple of 64.
        input_gate: "exp" (mLSTMexp, normalised) or "sigmoid" (mLSTMsig, not normalised).
        gate_soft_cap: input and forget gate x become cap tanh(x / cap); None: no cap.
        logit_soft_cap: the same for the logits.
        norm_eps: added to the mean square or variance in every norm.
        tie_embeddings: the head shares the weight of the embedding.

    Raises:
        TypeError, ValueError: naming the field, what came and what is expected.

    Example:
        >>> from tfla.xlstm import XLSTMConfig
        >>> config = XLSTMConfig(vocab_size=256, hidden_size=128, num_layers=4, num_heads=4)
        >>> config.K, config.V, config.ffn_dim, config.num_parameters()
        (16, 32, 384, 923296)
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    ffn_factor: float = 2.667
    input_gate: gates.InputGate = "exp"
    gate_soft_cap: float | None = 15.0
    logit_soft_cap: float | None = 30.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int; got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
            if value >= 2**31:  # beyond the sizes of tensors, in products with others
                raise ValueError(f"{name} must be below 2^31; got {reprlib.repr(value)}.")
        factors = ("qk_dim_factor", "v_dim_factor", "ffn_factor")
        for name in (*factors, "gate_soft_cap", "logit_soft_cap", "norm_eps"):
            value = getattr(self, name)
            if value is None and name.endswith("cap"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number; got {value!r}.")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite; got {value}.")
        gates.input_gate(self.input_gate)
        if not isinstance(self.tie_embeddings, bool):
            raise TypeError(f"tie_embeddings must be True or False; got {self.tie_embeddings!r}.")
        for name, dim in (("qk_dim_factor", self.qk_dim), ("v_dim_factor", self.v_dim)):
            factor = getattr(self, name)
            product = self.hidden_size * factor
            if dim < 1 or abs(product - dim) > 1e-6 * dim or dim % self.num_heads:
                raise ValueError(
                    f"hidden_size * {name} = {self.hidden_size} * {factor} = {product:g} must be a "
                    f"whole multiple of num_heads = {self.num_heads}; change one of the three."
                )

    @property
    def normalize(self) -> bool:
        """Is h divided by the normaliser? As the input gate has it by default."""
        return gates.input_gate(self.input_gate).normalize

    @property
    def qk_dim(self) -> int:
        """H K, the width of all queries (or keys) together."""
        return round(self.hidden_size * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        """H V, the width of all values (or output gates) together."""
        return round(self.hidden_size * self.v_dim_factor)

    @property
    def K(self) -> int:
        """Width of a query or key of one head."""
        return self.qk_dim // self.num_heads

    @property
    def V(self) -> int:
        """Width of a value of one head."""
        return self.v_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Inner width of the SwiGLU: the whole part of d ffn_factor, up to a multiple of 64."""
        return int(self.hidden_size * self.ffn_factor + 63) // 64 * 64

    @classmethod
    def xlstm_7b(cls) -> XLSTMConfig:
        """xLSTM 7B: 6,865,424,896 parameters, 32 blocks of 4096, 8 heads with K = 256, V = 512."""
        return cls(vocab_size=50304, hidden_size=4096, num_layers=32, num_heads=8)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON; ``from_dict`` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> XLSTMConfig:
        """What ``to_dict`` wrote. ValueError names every unknown and every missing field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(fields.keys() - known), sorted(known - fields.keys())
        if unknown or missing:
            raise ValueError(
                f"from_dict needs exactly the fields that to_dict() writes; got unknown fields "
                f"{unknown}, missing are {missing}."
            )
        return cls(**fields)

    def num_parameters(self) -> int:
        """Number of trained numbers, a tied embedding counted once.

        layers (d (2 H K + 3 H V + 2 H + 3 ffn) + 2 H + H V + 2 d) + d + d vocab (tied: 1, else 2)
        """
        d, tables = self.hidden_size, 1 if self.tie_embeddings else 2
        layer = self._layer_weights + 2 * self.num_heads + self.v_dim + 2 * d
        return self.num_layers * layer + d + tables * self.vocab_size * d

    def flops_per_token(self, training: bool = False, *, chunk: int = 64) -> int:
        """FLOPs a token, a multiply-add counted as two; element-wise work is left out.

            matrices   2 (layers d (2 H K + 3 H V + 2 H + 3 ffn) + d vocab)      training: times 3
            mLSTM      layers H (2 L (K + V') + 4 K V')                          training: times 4

        V' = V + 1 with the normaliser, which is one more value column, else V. L is `chunk`, the
        tokens that the kernels take at once; 0 counts the bare recurrence, which is what decoding
        costs. The scan runs once forward and three times backward, hence times 4.
        """
        values = self.V + self.normalize
        head = 2 * chunk * (self.K + values) + 4 * self.K * values
        scan = self.num_layers * self.num_heads * head
        matmuls = 2 * (self.num_layers * self._layer_weights + self.vocab_size * self.hidden_size)
        return 3 * matmuls + 4 * scan if training else matmuls + scan

    def state_bytes(self, batch_size: int = 1, *, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state of `batch_size` sequences, of any length.

            exp       batch layers H ((K V + K) itemsize + itemsize of m)      C, n and m
            sigmoid   batch layers H   K V      itemsize                       C alone

        `dtype` is that of C and n; m stays in fp32 (fp64 beside fp64).
        """
        K, V, size = self.K, self.V, dtype.itemsize
        head = (K * V + K) * size + max(size, 4) if self.normalize else K * V * size
        return batch_size * self.num_layers * self.num_heads * head

    @property
    def _layer_weights(self) -> int:
        """Numbers in the weight matrices of one block."""
        rows = 2 * self.qk_dim + 3 * self.v_dim + 2 * self.num_heads + 3 * self.ffn_dim
        return self.hidden_size * rows
