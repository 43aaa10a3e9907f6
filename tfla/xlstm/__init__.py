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

__all__ = [
    "XLSTM", "Block", "Generation", "MLSTMLayer", "Stream", "SwiGLU", "XLSTMConfig", "load_state",
    "prefill", "put", "sample", "save_state", "take",
]  # fmt: skip
