"""``mLSTMBackend`` and ``mLSTMBackendConfig`` on tfla, where mlstm_kernels is not installed.

    from tfla.integrations.mlstm_backend import mLSTMBackend, mLSTMBackendConfig

in place of ``from mlstm_kernels.torch.backend_module import ...`` is all that a model changes. The
names of kernels choose the input gate, nothing else; see ``tfla.integrations.mlstm_kernels``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfla.integrations import mlstm_kernels
from tfla.integrations.mlstm_kernels import Output

__all__ = ["mLSTMBackend", "mLSTMBackendConfig"]

MODES = ("train", "train_with_padding", "inference")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class mLSTMBackendConfig:
    """What ``mLSTMBackend`` computes with; fields and defaults are those of mlstm_kernels 2.0.6.

    Args:
        chunkwise_kernel: "chunkwise--..." or "parallel--..." of ``mlstm_kernels.KERNELS``; those
            with "siging" have the sigmoid input gate.
        sequence_kernel, step_kernel: names of the same table.
        mode: "train", "train_with_padding" or "inference"; a call may name another.
        chunk_size, eps: accepted, without effect.
        return_last_states: whether training returns states; a call may say otherwise.
        autocast_kernel_dtype: of q, k and v under torch.autocast.
        inference_state_dtype: of c and n in inference ("float32" or "bfloat16"); m is fp32.
        normalize_siging: divide by the normaliser with the sigmoid gate.
    """

    chunkwise_kernel: str = "chunkwise--native_autograd"
    sequence_kernel: str = "native_sequence__native"
    step_kernel: str = "native"
    mode: str = "train"
    chunk_size: int = 64
    return_last_states: bool = True
    autocast_kernel_dtype: str = "bfloat16"
    eps: float = 1e-6
    inference_state_dtype: str = "float32"
    normalize_siging: bool = True


class mLSTMBackend(nn.Module):
    """The mLSTM as a module without parameters: ``tfla.mlstm`` and ``tfla.mlstm_step``.

    Sequences may have any length in any mode; a single token without gradients takes the decode
    step. q, k and v have one dtype; incoming states may have any.

    Args:
        config: what it computes with.

    Raises:
        ValueError: a field of the configuration that names nothing.

    Example:
        >>> import torch
        >>> from tfla.integrations.mlstm_backend import mLSTMBackend, mLSTMBackendConfig
        >>> backend = mLSTMBackend(mLSTMBackendConfig(mode="inference"))
        >>> q, k, v = torch.randn(3, 2, 4, 50, 32).unbind(0)       # (B, NH, S, DH)
        >>> i, f = torch.randn(2, 4, 50), torch.randn(2, 4, 50) + 3
        >>> h, (c, n, m) = backend(q, k, v, i, f)
        >>> h.shape, c.shape
        (torch.Size([2, 4, 50, 32]), torch.Size([2, 4, 32, 32]))
    """

    config_class = mLSTMBackendConfig

    def __init__(self, config: mLSTMBackendConfig) -> None:
        super().__init__()
        self.config = config
        kernels = {
            f"{kind}--{name}": function
            for kind in ("chunkwise", "parallel")
            for name, function in mlstm_kernels.KERNELS[kind].items()
        }
        _one_of("chunkwise_kernel", config.chunkwise_kernel, kernels)
        _one_of("sequence_kernel", config.sequence_kernel, mlstm_kernels.KERNELS["sequence"])
        _one_of("step_kernel", config.step_kernel, mlstm_kernels.KERNELS["step"])
        _one_of("mode", config.mode, MODES)
        _one_of("autocast_kernel_dtype", config.autocast_kernel_dtype, DTYPES)
        _one_of("inference_state_dtype", config.inference_state_dtype, DTYPES)
        self._kernel = kernels[config.chunkwise_kernel]
        self._options: dict[str, Any] = {
            "autocast_kernel_dtype": getattr(torch, config.autocast_kernel_dtype)
        }
        if "siging" in config.chunkwise_kernel:
            self._options["normalize"] = config.normalize_siging

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool | None = None,
        mode: str | None = None,
    ) -> Output:
        """Read a sequence, or the next part of one.

        Dimensions: B batch, NH heads, S tokens, DHQK and DHHV head dims of q and k, of v.

        Args:
            q, k: (B, NH, S, DHQK).
            v: (B, NH, S, DHHV).
            i, f: (B, NH, S), pre-activations of the input gate and the forget gate.
            c_initial: (B, NH, DHQK, DHHV), the memory; None: nothing has been read.
            n_initial: (B, NH, DHQK), the normaliser.
            m_initial: (B, NH, 1), the exponent by which both are scaled.
            return_last_states: None: what the configuration says. Inference always returns them.
            mode: "train" or "inference"; None: what the configuration says.

        Returns:
            h: (B, NH, S, DHHV) in the dtype of v; or h and (c, n, m) after the last token, shaped
            as the initial ones. m is fp32, c and n are fp32 in training and have
            ``inference_state_dtype`` in inference.

        Raises:
            ValueError: a mode that is none of these.
            TypeError, ValueError: of ``tfla.mlstm``, for shapes and dtypes that do not fit.
        """
        config = self.config
        mode = config.mode if mode is None else mode
        _one_of("mode", mode, MODES)
        tensors = {"q": q, "k": k, "v": v, "i": i, "f": f}
        states = {"c_initial": c_initial, "n_initial": n_initial, "m_initial": m_initial}
        if mode != "inference":
            wanted = config.return_last_states if return_last_states is None else return_last_states
            return self._kernel(**tensors, **states, **self._options, return_last_states=wanted)
        dtype = getattr(torch, config.inference_state_dtype)
        return mlstm_kernels.infer(self._kernel, dtype, **tensors, **states, **self._options)

    def extra_repr(self) -> str:
        """The configuration, where a module is printed."""
        return repr(self.config)


def _one_of(name: str, value: object, names: Collection[str]) -> None:
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}; got {value!r}.")
