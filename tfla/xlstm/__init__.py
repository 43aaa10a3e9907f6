"""xLSTM language models on the mLSTM: configuration, model, generation."""

from tfla.xlstm.config import XLSTMConfig
from tfla.xlstm.generate import (
    Generation,
    Stream,
    load_state,
    prefill,
    put,
    sample,
    save_state,
    take,
)
from tfla.xlstm.model import XLSTM, Block, MLSTMLayer, SwiGLU
from tfla.xlstm.writer import load

__all__ = [
    "XLSTM",
    "Block",
    "Generation",
    "MLSTMLayer",
    "Stream",
    "SwiGLU",
    "XLSTMConfig",
    "load",
    "load_state",
    "prefill",
    "put",
    "sample",
    "save_state",
    "take",
]
