"""Tiled Flash Linear Attention, the mLSTM and the linear-attention family from one scan."""

from tfla.api import State, linear_attention, mlstm, mlstm_step
from tfla.dispatch import supports

__version__ = "0.1.0"
__all__ = ["State", "__version__", "linear_attention", "mlstm", "mlstm_step", "supports"]
