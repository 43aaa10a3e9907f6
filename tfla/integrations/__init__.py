"""Bridges to other packages: their weights, and their models and kernels on our functions.

load_xlstm, save_xlstm                   checkpoints in transformers' xLSTM format
tfla.integrations.transformers.patch     a transformers xLSTM computes with tfla
tfla.integrations.mlstm_kernels.install  callers of mlstm_kernels compute with tfla
tfla.integrations.mlstm_backend          the module of mlstm_kernels, where that is not installed
tfla.integrations.fla.install            callers of fla's scalar-gated operators compute with tfla
tfla.integrations.torchao.quantize_int8  weights in int8, for inference
tfla.integrations.hub.assemble           a folder that the package kernels loads
"""

from tfla.integrations.weights import load_xlstm, save_xlstm

__all__ = ["load_xlstm", "save_xlstm"]
