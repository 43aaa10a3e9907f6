"""Weights in int8 by torchao: half the memory of a bf16 model, for inference."""

from __future__ import annotations

import importlib

from torch import nn

# An error in a gate acts on all later tokens, and their weights are a thousandth of the model.
GATES = ("gates", "igate_preact", "fgate_preact", "ifgate_preact")


def quantize_int8(model: nn.Module) -> nn.Module:
    """Hold the weights of a model's linear layers as int8, one scale a row (weight-only).

        W[r] = scale[r] * w[r],    w in -127, ..., 127,    scale in the dtype that W had

    Activations, norms, embedding, states and the gates stay as they are. What is called are the
    layers themselves, so hooks act; gradients of the weights are no longer there.

    Args:
        model: a ``tfla.xlstm.XLSTM``, or an xLSTM of transformers, patched or not; bf16 is what it
            is meant for. It is changed in place. A head that is tied to the embedding is left.

    Returns:
        The model.

    Raises:
        ImportError: torchao is not installed.
        ValueError: no linear layer to quantize.

    Example:
        >>> from tfla.integrations import load_xlstm
        >>> from tfla.integrations.torchao import quantize_int8
        >>> model = quantize_int8(load_xlstm("xLSTM-7b", device="cuda"))     # doctest: +SKIP
    """
    quantization = importlib.import_module("torchao.quantization")
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rsplit(".", 1)[-1] not in GATES
        and id(module.weight) not in shared
    }
    if not chosen:
        raise ValueError(f"model must have linear layers; got {type(model).__name__} without any.")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: name in chosen,
    )
    return model
