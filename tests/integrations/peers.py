"""What the tests against other packages share: small models of theirs whose gates do something."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others warn about when they are imported is their affair
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers, of the extra peers", exc_type=ImportError
    )
    from transformers import xLSTMConfig, xLSTMForCausalLM

    try:
        import mlstm_kernels.torch.backend_module
        import mlstm_kernels.torch.chunkwise  # noqa: F401
    except ImportError:  # transformers then computes by itself
        pass

VOCAB = 97


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Random gates and norms: with the initial ones every gate is one constant, that of a SwiGLU 0,
    and every norm 1."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator).to(parameter)
        if "gate_preact.bias" in name:
            parameter.copy_(values)
        elif "ogate_preact.weight" in name or "proj_up_gate.weight" in name:
            parameter.copy_(values * (2 / (5 * parameter.shape[1])) ** 0.5)
        elif "gate_preact.weight" in name:
            parameter.copy_(values * 0.3)
        elif "norm" in name:
            parameter.copy_(1 + 0.2 * values)


def make(dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """A small model of transformers. weight_mode="fused" gets the weights of the single one."""
    mode = fields.pop("weight_mode", "single")
    widths = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2}
    fields = {**widths, "eos_token_id": None, "pad_token_id": None, **fields}
    torch.manual_seed(3)
    single = xLSTMForCausalLM(xLSTMConfig(**fields)).to(dtype).eval()
    stir(single)
    if mode == "single":
        return single
    # Its own initialisation of a fused model fails, so that of the single one stands in.
    with torch.device("meta"):
        fused = xLSTMForCausalLM(xLSTMConfig(**fields, weight_mode="fused"))
    fused.load_state_dict(fuse(single.state_dict()), assign=True)
    return fused.eval()


def fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of weight_mode "single" as one of "fused"."""
    parts = {
        "qkv_opreact": ("q", "k", "v", "ogate_preact"),
        "ifgate_preact": ("igate_preact", "fgate_preact"),
        "proj_up_gate_z": ("proj_up_gate", "proj_up"),
    }
    first = {names[0]: (fused, names) for fused, names in parts.items()}
    rest = {name for names in parts.values() for name in names[1:]}
    out = {}
    for name, value in state.items():
        path, kind = name.rsplit(".", 1)
        parent, _, leaf = path.rpartition(".")
        if leaf in first:
            fused, names = first[leaf]
            out[f"{parent}.{fused}.{kind}"] = torch.cat(
                [state[f"{parent}.{part}.{kind}"] for part in names]
            )
        elif leaf not in rest:
            out[name] = value
    return out


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(5))


def relative(a: Tensor, b: Tensor) -> float:
    """Largest deviation, over the size of what is wanted."""
    return ((a - b).abs().max() / b.abs().max()).item()
