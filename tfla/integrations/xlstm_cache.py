"""The cache of a patched xLSTM. Needs transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.xlstm.modeling_xlstm import xLSTMCache

from tfla.integrations.inference import TokenGraph


class Cache(xLSTMCache):
    """transformers' cache, with what beam search asks of one, and the graph of a token for it."""

    graph: TokenGraph | None = None

    @classmethod
    def adopt(cls, cache: xLSTMCache) -> xLSTMCache:
        """A cache of transformers' own class becomes one of ours; any other stays what it is."""
        if type(cache) is xLSTMCache:
            cache.__class__ = cls
        return cache

    def reorder_cache(self, rows: Tensor) -> None:
        """Row n becomes what row rows[n] was."""
        for states in self.rnn_state.values():
            for state in states:
                state.copy_(state.index_select(0, rows.to(state.device)))

    def widen(self, low: torch.dtype, full: torch.dtype) -> None:
        """C and n to `low`, m to `full`, where they are another; transformers makes all of them in
        the dtype of the model."""
        for layer, (c, n, m) in self.rnn_state.items():
            if (c.dtype, n.dtype, m.dtype) != (low, low, full):
                self.rnn_state[layer] = (c.to(low), n.to(low), m.to(full))
