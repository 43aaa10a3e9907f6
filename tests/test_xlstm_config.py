"""The configuration of an xLSTM: what it costs, what it refuses, and that JSON keeps it whole."""

import dataclasses
import json
import math

import pytest
import torch

from tfla.xlstm import XLSTM, XLSTMConfig

SMALL = XLSTMConfig(vocab_size=23, hidden_size=24, num_layers=2, num_heads=3)
CONFIGS = [
    SMALL,
    dataclasses.replace(SMALL, input_gate="sigmoid", tie_embeddings=True),
    XLSTMConfig(64, 80, 3, 5, qk_dim_factor=1.0, v_dim_factor=2.0, ffn_factor=1.3),
    XLSTMConfig(7, 16, 1, 1, qk_dim_factor=0.75, gate_soft_cap=None, logit_soft_cap=None),
]


def test_the_7b_layout_has_the_published_number_of_parameters() -> None:
    config = XLSTMConfig.xlstm_7b()
    with torch.device("meta"):
        model = XLSTM(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters() == 6_865_424_896
    assert (config.K, config.V, config.ffn_dim) == (256, 512, 10944)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_num_parameters_counts_the_model(config: XLSTMConfig) -> None:
    assert config.num_parameters() == sum(p.numel() for p in XLSTM(config).parameters())


def test_flops_by_hand() -> None:
    config = XLSTMConfig(vocab_size=10, hidden_size=8, num_layers=3, num_heads=2, ffn_factor=8.0)
    assert (config.K, config.V, config.ffn_dim) == (2, 4, 64)
    matrices = 8 * (4 + 4 + 8 + 8) + 8 * 4 + 8 * 8 + 3 * 8 * 64  # q k v o, gates, out, SwiGLU
    linear = 2 * (3 * matrices + 8 * 10)
    recurrence = 3 * 2 * 4 * 2 * 5  # layers, heads, K, V and the normaliser
    assert config.flops_per_token(chunk=0) == linear + recurrence
    chunked = recurrence + 3 * 2 * 2 * 64 * (2 + 5)
    assert config.flops_per_token() == linear + chunked
    assert config.flops_per_token(training=True) == 3 * linear + 4 * chunked
    sigmoid = dataclasses.replace(config, input_gate="sigmoid")
    assert sigmoid.flops_per_token(chunk=0) == linear + 3 * 2 * 4 * 2 * 4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_flops_of_the_matrices_are_those_of_the_model(config: XLSTMConfig) -> None:
    linear = [m for m in XLSTM(config).modules() if isinstance(m, torch.nn.Linear)]
    scan = config.num_layers * config.num_heads * 4 * config.K * config.V
    scan += scan // config.V if config.input_gate == "exp" else 0
    assert config.flops_per_token(chunk=0) == 2 * sum(m.weight.numel() for m in linear) + scan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_state_bytes_counts_the_state(config: XLSTMConfig, dtype: torch.dtype) -> None:
    state = XLSTM(config).init_state(5, dtype=dtype)
    bytes_ = sum(t.nbytes for layer in state for t in layer if t is not None)
    assert config.state_bytes(5, dtype=dtype) == bytes_


def test_the_7b_state_is_135_mb_a_sequence() -> None:
    assert XLSTMConfig.xlstm_7b().state_bytes() == 32 * 8 * (256 * 512 + 256 + 1) * 4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_config_survives_json(config: XLSTMConfig) -> None:
    assert XLSTMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert len(dataclasses.fields(config)) <= 12


def test_from_dict_names_what_is_wrong() -> None:
    fields = SMALL.to_dict() | {"colour": "red"}
    del fields["norm_eps"]
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\], missing are \['norm_eps'"):
        XLSTMConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1; got 0"),
        ({"num_layers": 2.0}, TypeError, "num_layers must be an int; got 2.0"),
        ({"num_heads": True}, TypeError, "num_heads must be an int"),
        ({"num_heads": 5}, ValueError, "24 . 0.5 = 12 must be a whole multiple of num_heads = 5"),
        ({"v_dim_factor": 0.3}, ValueError, "v_dim_factor = 24 . 0.3 = 7.2 must be a whole"),
        ({"qk_dim_factor": 0.001}, ValueError, "qk_dim_factor"),
        ({"ffn_factor": -1.0}, ValueError, "ffn_factor must be positive and finite; got -1.0"),
        ({"ffn_factor": None}, TypeError, "ffn_factor must be a number"),
        ({"norm_eps": math.nan}, ValueError, "norm_eps must be positive and finite; got nan"),
        ({"gate_soft_cap": "15"}, TypeError, "gate_soft_cap must be a number; got '15'"),
        ({"input_gate": "relu"}, ValueError, "'exp' or 'sigmoid'; got 'relu'"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings must be True or False; got 1"),
    ],
)
def test_a_wrong_field_is_named(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        dataclasses.replace(SMALL, **change)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.num_layers = 3  # type: ignore[misc]
