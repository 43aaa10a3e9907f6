"""Bridges to other packages: their weights, and their models and kernels on our functions.

load_xlstm, save_xlstm                   checkpoints in transformers' xLSTM format
tfla.integrations.transformers.patch     a transformers xLSTM computes with tfla
tfla.integrations.mlstm_kernels.install  whatever calls mlstm_kernels computes with tfla
"""

from tfla.integrations.weights import load_xlstm, save_xlstm

__all__ = ["load_xlstm", "save_xlstm"]
