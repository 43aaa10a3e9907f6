"""xLSTM checkpoints in transformers' format: config.json beside safetensors, whole or in shards.

Their ``weight_mode="fused"`` is the layout of ``tfla.xlstm`` under other names; in "single" every
matrix of ours is several of theirs, one below the other. No pickle is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tfla.integrations import shards
from tfla.xlstm import XLSTM, XLSTMConfig
from tfla.xlstm.checkpoint import warn_unless_finite
from tfla.xlstm.files import atomic_folder

CONFIG = "config.json"

# What transformers assumes for a field that config.json leaves out: (theirs, ours, value).
FIELDS = (
    ("vocab_size", "vocab_size", 50304),
    ("num_heads", "num_heads", 8),
    ("qk_dim_factor", "qk_dim_factor", 0.5),
    ("v_dim_factor", "v_dim_factor", 1.0),
    ("gate_soft_cap", "gate_soft_cap", 15.0),
    ("output_logit_soft_cap", "logit_soft_cap", 30.0),
    ("norm_eps", "norm_eps", 1e-6),
)

EMBEDDING = "backbone.embeddings.weight"  # xlstm_large says embedding.weight

_TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}

Parts = list[tuple[str, int]]  # names of theirs, one below the other, and the rows of each


def load_xlstm(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> XLSTM:
    """An ``XLSTM`` with the weights of a transformers xLSTM checkpoint, such as NX-AI/xLSTM-7b or
    those of 160M to 7B parameters of the scaling laws (arXiv 2510.02228).

    Logits are those of transformers to rounding, but for the eps (1e-6) that transformers adds to
    the denominator of h and tfla does not.

    Args:
        path: a folder with config.json and model.safetensors, or its shards with
            model.safetensors.index.json; weight_mode "single" or "fused". Also a folder as the
            scaling laws' are: shards model_0.safetensors, ... without an index, and xlstm_large's
            names, ``embedding_dim`` and ``num_blocks`` in config.json and ``embedding.weight``.
            ``save_xlstm`` then makes it one that transformers reads.
        dtype: of the parameters; None: what config.json states, else that of the embedding.
        device: where to put them. One parameter at a time passes through the CPU's memory.

    Raises:
        FileNotFoundError: a file that is missing, and a tensor that should be in it.
        UserWarning (a warning): weights that are NaN or infinite.
        ValueError: naming the file, and the tensor or field: a truncated or damaged file, another
            architecture, a tensor that is missing, left over, or of another shape.

    Example:
        >>> from tfla.integrations import load_xlstm
        >>> model = load_xlstm("xLSTM-7b", device="cuda")                # doctest: +SKIP
        >>> model.generate([[1, 2, 3]], 20, temperature=0).tokens        # doctest: +SKIP
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name the one that holds {CONFIG}.")
    fields = shards.read_json(folder / CONFIG)
    config = _config(folder / CONFIG, fields)
    mode = _weight_mode(folder / CONFIG, fields)
    with shards.Tensors(folder) as source:
        if fields.get("tie_word_embeddings") and "lm_head.weight" not in source:
            config = dataclasses.replace(config, tie_embeddings=True)
        if 2 * config.num_parameters() > source.bytes:  # a number has 16 bits at least
            raise ValueError(
                f"{folder / CONFIG} claims a model of {config.num_parameters():,} parameters; the "
                f"files of its weights have {source.bytes:,} bytes."
            )
        with torch.device("meta"):
            model = XLSTM(config)
        names, own = names_in_checkpoint(config, mode), dict(model.named_parameters())
        embedding = _embedding_name(source)
        names["embedding.weight"] = [(embedding, config.vocab_size)]
        source.check(
            {
                name: (rows, *own[key].shape[1:])
                for key, parts in names.items()
                for name, rows in parts
            }
        )
        dtype = dtype or _stated_dtype(fields) or source[embedding].dtype
        state = {}
        for key, parts in names.items():
            state[key] = torch.empty(own[key].shape, dtype=dtype, device=device)
            pieces = state[key].split([rows for _, rows in parts])
            for (name, _), piece in zip(parts, pieces, strict=True):
                piece.copy_(source[name])
    warn_unless_finite(folder, state.items())
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings or (
        fields.get("tie_word_embeddings") and torch.equal(model.head.weight, model.embedding.weight)
    ):
        model.config = dataclasses.replace(config, tie_embeddings=True)
        model.head.weight = model.embedding.weight
    return model


def save_xlstm(
    model: XLSTM,
    path: str | Path,
    *,
    weight_mode: str = "single",
    max_shard_bytes: int = 5 * 10**9,
    fields: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write `model` as a folder that ``xLSTMForCausalLM.from_pretrained`` and ``load_xlstm`` read.

    Args:
        model: with the exponential input gate; transformers has no other.
        path: a folder that does not exist or is empty; it appears whole or not at all.
        weight_mode: "single", transformers' default, or "fused".
        max_shard_bytes: start another file when one would grow beyond this.
        fields: further fields for config.json, e.g. {"eos_token_id": 2}. Without them the ids of
            the beginning, the end and of padding are null, not transformers' 0, 2 and 1.
        texts: further files of the folder, name: content; those of a tokenizer, say.

    Returns:
        The folder.

    Raises:
        ValueError: what transformers cannot hold: a sigmoid input gate, widths H K or H V that are
            no multiples of 64 (its cache rounds them up); a field that the model itself determines.
        FileExistsError: the folder is not empty.

    Example:
        >>> from tfla.integrations import save_xlstm
        >>> from tfla.xlstm import XLSTM, XLSTMConfig
        >>> config = XLSTMConfig(vocab_size=256, hidden_size=128, num_layers=2, num_heads=2)
        >>> save_xlstm(XLSTM(config), "exported")                        # doctest: +SKIP
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder; name another or empty it.")
    if weight_mode not in ("single", "fused"):
        raise ValueError(f"weight_mode must be 'single' or 'fused'; got {weight_mode!r}.")
    body = _describe(model.config, weight_mode, model.embedding.weight.dtype)
    if taken := sorted(body.keys() & (fields or {}).keys() - _TOKEN_IDS):
        raise ValueError(f"fields must not contain {taken}: the model determines them.")
    body |= fields or {}
    names = names_in_checkpoint(model.config, weight_mode)
    # transformers 5 reads both tables also where its configuration says that they are one.
    names["head.weight"] = [("lm_head.weight", model.config.vocab_size)]
    own = dict(model.named_parameters(remove_duplicate=False))
    if missing := sorted(names.keys() - own.keys()):
        raise ValueError(
            f"model must hold {missing[0]} as a parameter of that name; adapters, pruning and "
            "parametrizations keep it elsewhere. Put them into the weights first: "
            "merge_and_unload(), prune.remove or parametrize.remove_parametrizations."
        )
    if strange := [key for key in names if type(own[key]) is not torch.nn.Parameter]:
        raise ValueError(
            f"model must hold {strange[0]} as a plain parameter; it is a quantized or wrapped one, "
            f"{type(own[strange[0]]).__name__}. Save the model before it is quantized."
        )
    pieces = {
        name: piece
        for key, parts in names.items()
        for (name, _), piece in zip(parts, own[key].split([n for _, n in parts]), strict=True)
    }
    sizes = {name: piece.numel() * piece.element_size() for name, piece in pieces.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        shards.write(temporary, sizes, lambda name: pieces[name].clone(), max_shard_bytes)
        config = json.dumps(body, indent=2, sort_keys=True) + "\n"
        for name, text in ({**(texts or {}), CONFIG: config}).items():
            (temporary / name).write_text(text, "utf-8")
    return folder


# ------------------------------------------------------------------------------- names and widths


def names_in_checkpoint(config: XLSTMConfig, mode: str = "single") -> dict[str, Parts]:
    """For each parameter of ours, what it is made of in a checkpoint, from the first row down."""
    single = mode == "single"
    qk, v, H = config.qk_dim, config.v_dim, config.num_heads
    d, ffn = config.hidden_size, config.ffn_dim
    qkvo: Parts = [("q.weight", qk), ("k.weight", qk), ("v.weight", v), ("ogate_preact.weight", v)]
    up: Parts = [("proj_up_gate.weight", ffn), ("proj_up.weight", ffn)]

    def gates(kind: str) -> Parts:
        both = [(f"igate_preact.{kind}", H), (f"fgate_preact.{kind}", H)]
        return both if single else [(f"ifgate_preact.{kind}", 2 * H)]

    block: dict[str, Parts] = {
        "norm_mlstm.weight": [("norm_mlstm.weight", d)],
        "mlstm.qkvo.weight": qkvo if single else [("qkv_opreact.weight", 2 * (qk + v))],
        "mlstm.gates.weight": gates("weight"),
        "mlstm.gates.bias": gates("bias"),
        "mlstm.norm_weight": [("multihead_norm.weight", v)],
        "mlstm.out.weight": [("out_proj.weight", d)],
        "norm_ffn.weight": [("norm_ffn.weight", d)],
        "ffn.up.weight": up if single else [("proj_up_gate_z.weight", 2 * ffn)],
        "ffn.down.weight": [("proj_down.weight", d)],
    }
    inside = {"mlstm": "mlstm_layer.", "ffn": "ffn."}
    names: dict[str, Parts] = {"embedding.weight": [(EMBEDDING, config.vocab_size)]}
    for n in range(config.num_layers):
        for own, parts in block.items():
            prefix = f"backbone.blocks.{n}.{inside.get(own.split('.')[0], '')}"
            names[f"blocks.{n}.{own}"] = [(prefix + name, rows) for name, rows in parts]
    names["norm.weight"] = [("backbone.out_norm.weight", d)]
    if not config.tie_embeddings:
        names["head.weight"] = [("lm_head.weight", config.vocab_size)]
    return names


def _embedding_name(source: shards.Tensors) -> str:
    """What a folder calls its embedding: transformers' name, or the one tensor that is named as an
    embedding in its place (xlstm_large has embedding.weight)."""
    others = [name for name in source if name.endswith(("embedding.weight", "embeddings.weight"))]
    return EMBEDDING if EMBEDDING in source or len(others) != 1 else others[0]


def _config(file: Path, fields: Mapping[str, Any]) -> XLSTMConfig:
    """The configuration that config.json describes, or an error that names the field."""
    # The scaling laws' config.json is that of xlstm_large, which names no kind of model.
    untyped = "model_type" not in fields and {"embedding_dim", "num_heads"} <= fields.keys()
    if not untyped and fields.get("model_type") != "xlstm":
        raise ValueError(
            f"{file} describes model_type {short(fields.get('model_type'))}; it must be 'xlstm', a "
            "model that transformers' xLSTMForCausalLM has saved."
        )
    named = fields.get("architectures") or ["xLSTMForCausalLM"]
    for name in named if isinstance(named, list) else [named]:
        if name != "xLSTMForCausalLM":
            raise ValueError(
                f"{file} describes architecture {short(name)}; it must be 'xLSTMForCausalLM'."
            )
    if fields.get("use_bias"):
        raise ValueError(
            f"{file} has use_bias true; tfla.xlstm has no biases but those of the gates."
        )
    if "siging" in str(fields.get("chunkwise_kernel")):
        raise ValueError(
            f"{file} has chunkwise_kernel {short(fields['chunkwise_kernel'])}, a sigmoid gate with "
            "a normaliser; tfla.xlstm has the exponential one, or the sigmoid without normaliser."
        )
    d = _either(file, fields, "hidden_size", "embedding_dim", 4096)
    layers = _either(file, fields, "num_hidden_layers", "num_blocks", 32)
    try:
        step = fields.get("ffn_round_up_to_multiple_of", 64)
        factor = fields.get("ffn_proj_factor", 2.667)
        ffn = int((d * factor + step - 1) // step * step)
        if ffn % 64:
            raise ValueError(f"its feed-forward width {ffn} is not a multiple of 64.")
        factor = factor if step == 64 else ffn / d
        values = {ours: fields.get(theirs, value) for theirs, ours, value in FIELDS}
        return XLSTMConfig(hidden_size=d, num_layers=layers, ffn_factor=factor, **values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{file} describes no model that tfla.xlstm has: {error}") from error


def _describe(config: XLSTMConfig, mode: str, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for a configuration, or an error that says why transformers cannot have it."""
    if config.input_gate != "exp":
        raise ValueError(
            f"input_gate is {config.input_gate!r}; transformers' xLSTM has the exponential one."
        )
    d = config.hidden_size
    for name, dim in (("qk_dim_factor", config.qk_dim), ("v_dim_factor", config.v_dim)):
        if dim % 64:
            raise ValueError(
                f"hidden_size * {name} is {dim}; transformers' xLSTM needs a multiple of 64."
            )
    widths = {
        "qk_dim_factor": _factor(config.qk_dim, d, config.qk_dim_factor),
        "v_dim_factor": _factor(config.v_dim, d, config.v_dim_factor),
        "ffn_proj_factor": config.ffn_factor,
        "ffn_round_up_to_multiple_of": 64,
    }
    fields = {theirs: getattr(config, ours) for theirs, ours, _ in FIELDS}
    return {
        **fields,
        **widths,
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": d,
        "embedding_dim": d,
        "num_hidden_layers": config.num_layers,
        "num_blocks": config.num_layers,
        "tie_word_embeddings": config.tie_embeddings,
        "use_bias": False,
        "weight_mode": mode,
        **dict.fromkeys(sorted(_TOKEN_IDS)),
    }


def _factor(dim: int, d: int, factor: float) -> float:
    """This factor, or the nearest whose product with d, cut off to a whole number, is dim."""
    for close in (factor, dim / d, math.nextafter(dim / d, math.inf)):
        if int(d * close) == dim:
            return close
    raise AssertionError(f"no factor of {d} gives {dim}")


def _either(file: Path, fields: Mapping[str, Any], name: str, other: str, default: int) -> int:
    """A field that goes by two names."""
    found = {key: fields[key] for key in (name, other) if fields.get(key) is not None}
    for key, value in found.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(
                f"{file} has {key} {short(value)}; it must be a whole number from 1 to 2^31 - 1."
            )
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{file} has {name} {fields[name]} but {other} {fields[other]}; they are one."
        )
    return next(iter(found.values()), default)


def short(value: Any) -> str:
    """A value of a file in a message."""
    return reprlib.repr(value)


def _weight_mode(file: Path, fields: Mapping[str, Any]) -> str:
    mode = fields.get("weight_mode", "single")
    if mode not in ("single", "fused"):
        raise ValueError(f"{file} has weight_mode {short(mode)}; it must be 'single' or 'fused'.")
    return mode


def _stated_dtype(fields: Mapping[str, Any]) -> torch.dtype | None:
    stated = getattr(torch, str(fields.get("dtype") or fields.get("torch_dtype")), None)
    return stated if isinstance(stated, torch.dtype) and stated.is_floating_point else None
