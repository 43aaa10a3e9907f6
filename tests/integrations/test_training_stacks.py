"""Trainer of transformers and adapters of peft, on a patched xLSTM and on ``tfla.xlstm``.

They need transformers, accelerate and peft: pip install 'tfla[dev,peers]', in an environment of its
own.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import VOCAB, make, relative, tokens, transformers
from torch import Tensor, nn

from tfla.integrations import load_xlstm, save_xlstm
from tfla.integrations.transformers import patch
from tfla.xlstm import XLSTM, XLSTMConfig

pytestmark = [
    pytest.mark.peers,
    # Of packages of others, about each other.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:(accelerate|peft|transformers|torch)"),
]

CONFIG = XLSTMConfig(vocab_size=VOCAB, hidden_size=128, num_layers=2, num_heads=2)


class ForTrainer(nn.Module):
    """``tfla.xlstm`` as Trainer wants a model: a loss where there are labels."""

    def __init__(self, model: XLSTM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits, _ = self.model(input_ids)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class Texts(torch.utils.data.Dataset):
    """A few texts, known by heart after some steps."""

    def __init__(self) -> None:
        self.texts = tokens(8, 33)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        return {"input_ids": self.texts[n], "labels": self.texts[n]}


def new_model(kind: str) -> nn.Module:
    if kind == "patched":
        return patch(make()).train()
    torch.manual_seed(3)
    return ForTrainer(XLSTM(CONFIG))


def trainer(model: nn.Module, folder: Path, steps: int, **options: Any) -> Any:
    pytest.importorskip("accelerate", reason="needs accelerate, of the extra peers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Texts())


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


# ------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("kind", ["patched", "tfla"])
def test_a_run_that_is_interrupted_goes_on_as_if_it_had_not_been(kind: str, tmp_path: Path) -> None:
    """Eight steps, and four, a checkpoint, and four more in another Trainer: the same weights."""
    whole = trainer(new_model(kind), tmp_path / "whole", 8)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    first = trainer(new_model(kind), tmp_path / "parts", 4)
    first.train()
    second = trainer(new_model(kind), tmp_path / "parts", 8)
    second.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-4"))
    assert second.state.global_step == 8
    a, b = (dict(run.model.named_parameters()) for run in (whole, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["patched", "tfla"])
def test_it_learns_a_few_texts(kind: str, tmp_path: Path) -> None:
    run = trainer(new_model(kind), tmp_path, 25, save_strategy="no")
    run.train()
    assert losses(run)[-1] < 0.7 * losses(run)[0]


def test_what_trainer_has_written_is_read_by_both(tmp_path: Path) -> None:
    run = trainer(new_model("patched"), tmp_path, 4)
    run.train()
    x, checkpoint = tokens(2, 30), tmp_path / "checkpoint-4"
    again = transformers.xLSTMForCausalLM.from_pretrained(checkpoint)
    model = run.model.eval()
    with torch.no_grad():
        wanted = model(x).logits
        assert relative(patch(again).eval()(x).logits, wanted) < 1e-5
        assert relative(load_xlstm(checkpoint)(x)[0], wanted) < 1e-3


def test_evaluation_expects_what_training_does(tmp_path: Path) -> None:
    """It reads without gradients, and so by another way."""
    run = trainer(new_model("patched"), tmp_path, 4, save_strategy="no")
    run.train()
    found = run.evaluate(Texts())["eval_loss"]
    x = Texts().texts
    wanted = run.model.train()(input_ids=x, labels=x).loss
    assert wanted.requires_grad
    assert found == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    options = {"save_strategy": "no"}
    plain = trainer(new_model("patched"), tmp_path / "a", 3, **options)
    plain.train()
    options |= {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    less = trainer(new_model("patched"), tmp_path / "b", 3, **options)
    less.train()
    torch.testing.assert_close(losses(less), losses(plain), rtol=1e-4, atol=1e-4)


def test_bf16_autocast_trains(tmp_path: Path) -> None:
    run = trainer(new_model("patched"), tmp_path, 20, save_strategy="no", bf16=True)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


# ------------------------------------------------------------------------------- peft

PATCHED = ["q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "out_proj"]
PATCHED += ["proj_up_gate", "proj_up", "proj_down"]
OURS = ["qkvo", "gates", "out", "up", "down", "head"]


def with_lora(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model and the same with LoRA on every projection, whose B is not 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="needs peft", exc_type=ImportError)
    plain = new_model(kind)
    plain = plain.model if kind == "tfla" else plain
    targets = OURS if kind == "tfla" else [*PATCHED, "lm_head"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    adapted = peft.get_peft_model(copy.deepcopy(plain), config)
    adapters = {name.split(".lora_A")[0] for name, _ in adapted.named_modules() if "lora_A" in name}
    assert {name.rsplit(".", 1)[-1] for name in adapters} == set(targets)
    return plain.eval(), adapted.eval()


def stir_adapters(adapted: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out[0] if isinstance(out, tuple) else out.logits


@pytest.mark.parametrize("kind", ["patched", "tfla"])
def test_lora_on_every_projection_acts_and_merges(kind: str) -> None:
    plain, adapted = with_lora(kind)
    x = tokens(2, 20)
    assert relative(logits(adapted, x), logits(plain, x)) < 1e-6  # B is 0
    stir_adapters(adapted)
    with_adapters = logits(adapted, x)
    assert relative(with_adapters, logits(plain, x)) > 1e-2
    merged = adapted.merge_and_unload()
    assert relative(logits(merged, x), with_adapters) < 1e-3
    assert type(merged) is type(plain)


@pytest.mark.parametrize("kind", ["patched", "tfla"])
def test_every_adapter_has_a_gradient_and_nothing_else(kind: str) -> None:
    _, adapted = with_lora(kind)
    stir_adapters(adapted)
    adapted.train()
    out = adapted(tokens(2, 20))
    (out[0] if isinstance(out, tuple) else out.logits).pow(2).sum().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == ("lora" in name), name


def test_a_patched_model_generates_with_its_adapters() -> None:
    """Token by token through the adapters, as without a cache."""
    plain, adapted = with_lora("patched")
    stir_adapters(adapted)
    x, options = tokens(2, 9), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 11}
    out = adapted.generate(input_ids=x, **options)
    assert torch.equal(out, adapted.generate(input_ids=x, use_cache=False, **options))
    assert torch.equal(adapted.merge_and_unload().generate(x, **options), out)
    assert not torch.equal(plain.generate(x, **options), out)


def test_tfla_xlstm_generates_with_its_adapters() -> None:
    plain, adapted = with_lora("tfla")
    stir_adapters(adapted)
    x = tokens(2, 9)
    inner = adapted.get_base_model()
    out = inner.generate(x, 8, temperature=0).tokens
    text = x
    for n in range(8):
        assert torch.equal(logits(adapted, text)[:, -1].argmax(-1), out[:, n])
        text = torch.cat([text, out[:, n : n + 1]], 1)
    assert not torch.equal(plain.generate(x, 8, temperature=0).tokens, out)


def test_adapters_are_saved_loaded_and_merged_into_a_checkpoint(tmp_path: Path) -> None:
    plain, adapted = with_lora("tfla")
    stir_adapters(adapted)
    x = tokens(2, 20)
    wanted = logits(adapted, x)
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_xlstm(adapted.get_base_model(), tmp_path / "no")
    adapted.save_pretrained(tmp_path / "adapter")
    import peft

    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    assert torch.equal(logits(again, x), wanted)
    merged = save_xlstm(again.merge_and_unload(), tmp_path / "merged")
    assert relative(logits(load_xlstm(merged), x), wanted) < 1e-3


def test_trainer_trains_adapters_alone(tmp_path: Path) -> None:
    plain, adapted = with_lora("patched")
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    run = trainer(adapted.train(), tmp_path, 20, save_strategy="no")
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p.cpu(), before[n])}
    assert changed == {name for name in before if "lora" in name}
