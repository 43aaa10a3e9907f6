"""tfla bench language: only the mixer differs, the numbers are what they say, and a study that was
cut comes to the same result."""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from tfla.bench import language, language_study, plots, report
from tfla.bench.language import Mixing
from tfla.bench.language_study import (
    NAMES,
    SIZES,
    Asked,
    LanguageStudy,
    Plan,
    Size,
    Training,
    open_study,
)
from tfla.bench.runs import Row, Task
from tfla.cli import run_command
from tfla.errors import RunError
from tfla.xlstm import XLSTM, XLSTMConfig
from tfla.xlstm.data import Corpus
from tfla.xlstm.run import TrainOptions, start
from tfla.xlstm.train import evaluate, train

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        choose = random.Random(number).choice
        words = (choose(["what", "is", "read", "here", str(number), "\n"]) for _ in range(300))
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def asked(texts: Path) -> Asked:
    return Asked(
        paths=(str(texts),),
        include=(),
        tokenizer=None,
        device="cpu",
        precision="fp32",
        size="0.1m",
        context=16,
        batch=2,
        minutes=1.0,
        steps=STEPS,
        rates=(1e-3, 1e-2),
        seeds=2,
    )


@pytest.fixture
def study(tmp_path: Path, asked: Asked) -> LanguageStudy:
    """With a plan, as if all models had been timed."""
    study = open_study(tmp_path / "study", asked, False, 0.0)
    row = {"status": "ok", "parameters": 1, "peak_bytes": 1, "step_s": 1.0, "beside_s": 1.0}
    study.save_plan(Plan(STEPS, 1, dict.fromkeys(NAMES, row)))
    return study


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "SAMPLE", 8)


def row_of(training: Training, name: str, tell: Callable[..., None] | None = None) -> Row:
    task = Task("language", "cpu", "fp32", (name,), study="language", work=training)
    told: list[tuple[Any, ...]] = []

    def both(*message: Any) -> None:
        told.append(message)
        if tell is not None:
            tell(*message)

    language.language(task, CPU, both)
    [row] = [message[1] for message in told if message[0] == "row"]
    return row


def lasting(row: Row) -> Row:
    """What must be the same in every run: all but the clock."""
    return {key: value for key, value in row.items() if key not in ("seconds", "samples_ms")}


# ---------------------------------------------------------------- what is compared


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("vocab_size", [257, 32001])
def test_all_models_have_as_many_parameters(size: Size, vocab_size: int) -> None:
    found = {}
    with torch.device("meta"):
        for name in NAMES:
            config = XLSTMConfig(vocab_size=vocab_size, **size.config(name))
            model = XLSTM(config, size.mixer(name))
            found[name] = sum(p.numel() for p in model.parameters())
    assert found["tfla exp"] == found["tfla sigmoid"]
    assert max(found.values()) <= 1.01 * min(found.values())
    language.check_sizes(found)


def test_models_of_other_sizes_are_refused() -> None:
    with pytest.raises(RunError, match="differ by more than 1%"):
        language.check_sizes({"a": 1000, "b": 1011})
    language.check_sizes({"a": 1000, "b": 1010})


class Watched(Mixing):
    """Keeps the windows that the model is trained on, and its first parameters."""

    def build(
        self, config: XLSTMConfig, precision: str, weights: Path | None = None
    ) -> torch.nn.Module:
        model = super().build(config, precision, weights)
        self.windows: list[Tensor] = []

        def note(module: Any, inputs: tuple[Tensor]) -> None:
            if torch.is_grad_enabled():
                self.windows.append(inputs[0].clone())

        self.model.embedding.register_forward_pre_hook(note)
        self.drawn = {name: p.detach().clone() for name, p in model.named_parameters()}
        return model


def test_all_models_read_the_same_tokens_in_the_same_order(
    study: LanguageStudy, tmp_path: Path
) -> None:
    read, placements = {}, {}
    corpus = study.corpus()
    for name in NAMES:
        for seed in (0, 1):
            placement = Watched(CPU, study.asked, name)
            options = {**study.asked.options(STEPS, 1e-3, seed), "eval_bytes": 100}
            folder = tmp_path / f"{name} {seed}"
            for _ in train(start(folder, placement.config | options, corpus=corpus), placement):
                pass
            read[name, seed] = torch.cat(placement.windows)
            placements[name, seed] = placement
    for seed in (0, 1):
        same = [read[name, seed] for name in NAMES]
        assert same[0].shape == (2 * STEPS, 16)
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert not torch.equal(read["attention", 0], read["attention", 1])
    exp, sigmoid = (placements[name, 0].drawn for name in ("tfla exp", "tfla sigmoid"))
    assert all(torch.equal(exp[name], sigmoid[name]) for name in exp)


# ---------------------------------------------------------------- what is measured


def table_model(corpus: Corpus) -> tuple[XLSTM, Tensor]:
    """A model whose blocks write nothing, so that what follows depends on the last token alone;
    and -log2 p(next | last), (last, next) in fp64, written out."""
    config = XLSTMConfig(corpus.codec.vocab_size, hidden_size=8, num_layers=1, num_heads=2)
    model = XLSTM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter.zero_()
        model.head.weight.normal_()
    x = model.embedding.weight.detach().double()
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    logits = 30 * torch.tanh(x @ model.head.weight.detach().double().T / 30)
    return model, (logits.logsumexp(-1, keepdim=True) - logits) / math.log(2)


def test_bits_a_byte_in_closed_form(study: LanguageStudy) -> None:
    corpus, asked = study.corpus(), study.asked
    model, bits = table_model(corpus)
    found = language.judged(model, corpus, asked, CPU)
    pieces, _ = language_study.reported_text(corpus, asked)
    held = corpus.info["held_out"]
    tuning, first = language_study.tuning_text(corpus, asked.sized)
    size = (held["bytes"] - len(first)) / (held["tokens"] - 1 - len(tuning))  # without the last end
    each = bits[pieces[:, :-1], pieces[:, 1:]] / size
    assert each.shape == (len(pieces), 8 * asked.context) and len(pieces) > 2
    assert found["bits"] == pytest.approx(each.mean().item(), rel=1e-5)
    assert found["bits_long"] == pytest.approx(each.mean().item(), rel=1e-5)
    edges = found["positions"]
    assert len(found["by_position"]) == len(edges) - 1
    for begin, end, value in zip(edges, edges[1:], found["by_position"], strict=False):
        assert value == pytest.approx(each[:, begin:end].mean().item(), rel=1e-5)


def test_windows_begin_without_memory(study: LanguageStudy) -> None:
    """Of a model that remembers, written out: in windows of the context, and in the long ones."""
    corpus, asked = study.corpus(), study.asked
    torch.manual_seed(3)
    model = XLSTM(XLSTMConfig(corpus.codec.vocab_size, 8, num_layers=1, num_heads=2))
    with torch.no_grad():
        model.blocks[0].mlstm.gates.bias.fill_(2.0)
    found = language.judged(model, corpus, asked, CPU)
    pieces, size = language_study.reported_text(corpus, asked)
    for name, window in (("bits", asked.context), ("bits_long", 8 * asked.context)):
        rows = pieces[:, :-1].reshape(-1, window), pieces[:, 1:].reshape(-1, window)
        log_p = model(rows[0])[0].detach().double().log_softmax(-1)
        nats = -log_p.gather(-1, rows[1][..., None]).mean().item()
        assert found[name] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["bits"] != pytest.approx(found["bits_long"], rel=1e-5)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(study: LanguageStudy) -> None:
    corpus = study.corpus()
    model, _ = table_model(corpus)
    with torch.no_grad():
        model.head.weight.zero_()
    found = language.judged(model, corpus, study.asked, CPU)
    _, bytes_per_token = language_study.reported_text(corpus, study.asked)
    for bits in (found["bits"], found["bits_long"], *found["by_position"]):
        assert bits == pytest.approx(math.log2(257) / bytes_per_token, rel=1e-5)


def trained_tokenizer(texts: Path, lower: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(path) for path in sorted(texts.iterdir())], trainer)
    return tokenizer


def test_bits_are_by_byte_with_a_tokenizer_too(texts: Path, asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained_tokenizer(texts, lower=False).save(str(path))
    study = open_study(tmp_path / "a", dataclasses.replace(asked, tokenizer=str(path)), False, 0.0)
    corpus = study.corpus()
    model, bits = table_model(corpus)
    found = language.judged(model, corpus, study.asked, CPU)
    pieces, bytes_per_token = language_study.reported_text(corpus, study.asked)
    assert bytes_per_token > 1.5
    each = bits[pieces[:, :-1], pieces[:, 1:]] / bytes_per_token
    assert found["bits"] == pytest.approx(each.mean().item(), rel=1e-5)
    assert found["sample"]


def test_a_tokenizer_that_loses_text_is_refused(texts: Path, asked: Asked, tmp_path: Path) -> None:
    path, shouted = tmp_path / "tokenizer.json", tmp_path / "shouted"
    shouted.mkdir()
    for text in texts.iterdir():
        (shouted / text.name).write_text(text.read_text().upper())
    trained_tokenizer(texts, lower=True).save(str(path))
    other = dataclasses.replace(asked, tokenizer=str(path), paths=(str(shouted),))
    with pytest.raises(RunError, match="nothing can be said in bits a byte"):
        open_study(tmp_path / "a", other, False, 0.0)


def test_the_reported_text_is_none_that_rates_are_chosen_by(study: LanguageStudy) -> None:
    corpus, asked = study.corpus(), study.asked
    tuning, _ = language_study.tuning_text(corpus, asked.sized)
    whole, _ = corpus.held_out(10**9)
    rest, long = whole[len(tuning) - 1 :], 8 * asked.context
    every, _ = language_study.reported_text(corpus, asked)
    assert len(every) == (len(rest) - 1) // long  # as much as there is
    small = dataclasses.replace(SIZES["0.1m"], reported_bytes=3 * long, tuning_bytes=500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "0.1m", small)
        tuning, _ = language_study.tuning_text(corpus, asked.sized)
        pieces, _ = language_study.reported_text(corpus, asked)
    rest = whole[len(tuning) - 1 :]
    assert len(pieces) == 3
    assert torch.equal(pieces[0], rest[: long + 1])
    assert torch.equal(pieces[-1], rest[-long - 1 :])  # from its beginning to its end


@pytest.mark.parametrize("context", [1, 3, 16, 256, 1024])
def test_ranges_of_positions_end_at_the_context_and_at_eight_times_it(context: int) -> None:
    edges = language.position_edges(context)
    assert edges[0] == 0 and edges[-1] == 8 * context and edges == sorted(set(edges))
    assert context in edges


def test_the_course_of_a_training_is_that_of_its_records(asked: Asked) -> None:
    records = [
        {"event": "train", "step": 2, "tokens_per_second": 64.0},
        {"event": "train", "step": 4, "tokens_per_second": 32.0},
        {"event": "eval", "step": 4, "bits_per_byte": 5.0},
        {"event": "train", "step": 5, "tokens_per_second": 32.0},
        {"event": "eval", "step": 5, "bits_per_byte": 4.0},
    ]
    found = language.course(records, asked)  # 32 tokens a step
    assert found["tokens"] == [128, 160] and found["curve"] == [5.0, 4.0]
    assert found["seconds"] == [3.0, 4.0]
    assert found["samples_ms"] == [500.0, 1000.0, 1000.0]


def test_logits_are_held_against_fp64(study: LanguageStudy) -> None:
    model, _ = table_model(study.corpus())
    tokens = torch.randint(257, (1, 9))
    assert 0 < language.logits_error(model, tokens, "fp32") < 1e-5 < 1e-3
    assert 1e-4 < language.logits_error(model, tokens, "bf16") < 0.05


# ---------------------------------------------------------------- a study


def test_steps_fit_into_the_seconds_of_all_trainings() -> None:
    measured = {"a": {"step_s": 0.1, "beside_s": 2.0}, "b": {"step_s": 0.3, "beside_s": 1.0}}
    assert language_study.steps_that_fit(100.0, measured, 5, 1000) == (100 - 15) / (5 * 0.4) // 1
    assert language_study.steps_that_fit(100.0, measured, 5, 30) == 30
    with pytest.raises(RunError, match="take 0.6 minutes at least"):
        language_study.steps_that_fit(20.0, measured, 5, 1000)


def test_a_plan_reads_the_text_twice_at_most(study: LanguageStudy) -> None:
    corpus = study.corpus()
    long = dataclasses.replace(study.asked, steps=None, minutes=1e9)
    row = {"step_s": 1e-3, "beside_s": 0.0}
    found = language_study.plan_of(dataclasses.replace(study, asked=long), corpus, {"a": row}, 1)
    tokens = found.steps * long.context * long.batch
    assert 1.9 * len(corpus.train) < tokens <= 2 * len(corpus.train)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_that_was_cut_comes_to_the_same_result(
    name: str, study: LanguageStudy, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_study, "SAVE_SECONDS", 1e-9)
    whole = row_of(Training(study, 1e-3, 0), name)
    assert whole["status"] == "ok", whole
    other = open_study(tmp_path / "other", asked, False, 0.0)
    other.save_plan(study.plan())  # type: ignore[arg-type]

    class Cut(BaseException):
        pass

    for last in (2, 4):
        seen: list[str] = []

        def tell(kind: str, *message: Any, last: int = last, seen: list[str] = seen) -> None:
            seen += [message[1]] if kind == "begin" else []
            if seen and seen[-1].endswith(f"step {last}"):
                raise Cut

        with pytest.raises(Cut):
            row_of(Training(other, 1e-3, 0), name, tell)
        assert language_study.load_result(other.training_folder(name, 1e-3, 0)) is None
    assert not any(text.endswith("step 1") for text in seen)  # it went on, it did not begin anew
    found = row_of(Training(other, 1e-3, 0), name)
    assert json.dumps(lasting(found)) == json.dumps(lasting(whole))
    again = row_of(Training(other, 1e-3, 0), name)  # which now reads what there is
    assert again == found
    assert not list((other.training_folder(name, 1e-3, 0) / "checkpoints").iterdir())


def test_further_seeds_take_the_rate_that_is_best_on_the_tuning_text(study: LanguageStudy) -> None:
    swept = [row_of(Training(study, lr, 0), "tfla sigmoid") for lr in study.asked.rates]
    bits = {row["lr"]: row["curve"][-1] for row in swept}
    further = row_of(Training(study, None, 1), "tfla sigmoid")
    assert further["lr"] == min(bits, key=bits.__getitem__)
    assert [row["swept"] for row in (*swept, further)] == [True, True, False]
    best = language_study.chosen([*swept, further], "tfla sigmoid")
    assert [row["seed"] for row in best] == [0, 1] and best[1] is further
    assert language_study.chosen(swept, "attention") == []


def test_further_seeds_of_a_sweep_that_failed_say_so(study: LanguageStudy) -> None:
    row = row_of(Training(study, None, 1), "attention")
    assert row["status"] == "failed" and "no learning rate" in row["reason"]
    assert "Seed 1, each at its best learning rate" in report.title(row)


def test_a_model_that_was_not_timed_is_not_trained(study: LanguageStudy, tmp_path: Path) -> None:
    other = open_study(tmp_path / "other", study.asked, False, 0.0)
    row = row_of(Training(other, 1e-3, 0), "attention")
    assert row["status"] == "failed" and "has no plan" in row["reason"]
    assert "Seed 0, learning rate 0.001" in report.title(row)


def test_a_study_is_taken_up_with_its_own_options_alone(study: LanguageStudy) -> None:
    folder, asked = study.folder, study.asked
    assert open_study(folder, asked, True, 1.0).fingerprint == study.fingerprint
    with pytest.raises(RunError, match="add --resume"):
        open_study(folder, asked, False, 0.0)
    with pytest.raises(RunError, match="--seeds is 3, the study in .* was started with 2"):
        open_study(folder, dataclasses.replace(asked, seeds=3), True, 0.0)
    (folder / "plan.json").unlink()  # without a plan nothing has been trained
    again = open_study(folder, dataclasses.replace(asked, seeds=3), False, 0.0)
    assert again.asked.seeds == 3 and again.fingerprint == study.fingerprint
    (folder / "data" / "train.bin").write_bytes(b"other")
    with pytest.raises(RunError, match="not the corpus"):
        open_study(folder, again.asked, True, 0.0)


def test_tuning_bits_are_those_of_training(study: LanguageStudy) -> None:
    """The last number of the curve is what tfla.xlstm evaluates on the tuning text."""
    row = row_of(Training(study, 1e-3, 0), "tfla exp")
    assert row["tokens"] == [4 * 32, 6 * 32] and len(row["curve"]) == 2
    placement = Mixing(CPU, study.asked, "tfla exp")
    options = {**study.asked.options(STEPS, 1e-3, 0), "eval_bytes": 100}
    corpus = study.corpus()
    for _ in train(start(study.folder / "x", placement.config | options, corpus=corpus), placement):
        pass
    tuning, raw = language_study.tuning_text(corpus, study.asked.sized)
    bits = evaluate(placement.model, tuning, len(raw), TrainOptions(**options), CPU)
    assert row["curve"][-1] == pytest.approx(bits, rel=1e-6)


# ---------------------------------------------------------------- the command


def test_by_command(
    texts: Path, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on with a study that is planned and one training of which is over."""
    out = tmp_path / "out"
    words = f"bench language {texts} --size 0.1m --steps 3 --context 16 --batch 2 --seeds 1"
    words += f" --rates 1e-3 --device cpu --out {out}"
    own = dataclasses.replace(asked, minutes=10.0, steps=3, seeds=1, rates=(1e-3,))
    study = open_study(out / "language", own, False, 0.0)
    planned: list[tuple[Any, ...]] = []
    task = Task("language_plan", "cpu", "fp32", tuple(NAMES), study="plan", work=study)
    language.plan(task, CPU, lambda *message: planned.append(message))
    before = row_of(Training(study, 1e-3, 0), "tfla exp")
    assert before["status"] == "ok"
    assert run_command(words.split()) == 2
    assert "add --resume" in capsys.readouterr().err
    assert run_command([*words.split(), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} writes:" in printed for name in NAMES)
    rows = report.load(out / "language.json")["rows"]
    assert str(texts) not in (out / "language.json").read_text()
    assert rows[:3] == [message[1] for message in planned if message[0] == "row"]
    for row in rows[:3]:
        assert row["status"] == "ok" and row["peak_bytes"] > 0 and row["errors"]["logits"] < 1e-3
        assert abs(row["parameters"] / rows[0]["parameters"] - 1) < 0.01
    assert [row["implementation"] for row in rows[3:]] == list(NAMES)
    assert rows[3] == before
    for row in rows[3:]:
        assert row["status"] == "ok" and row["tokens"][-1] == 96 and row["bits"] > 0
    pictures = {path.name for path in out.glob("*.svg")}
    assert pictures == {f"language-{study}.svg" for study in ("tokens", "positions", "rates")}
    path = str(out / "language.json")
    assert run_command(["bench", "compare", path, path]) == 0
    assert "in 6 rows" in capsys.readouterr().out


def test_of_several_seeds_the_mean_and_the_range_are_told() -> None:
    rows = [
        {
            "kind": "language",
            "study": "language",
            "status": "ok",
            "implementation": name,
            "dtype": "fp32",
            "parameters": 1000,
            "peak_bytes": 2**20,
            "context": 16,
            "batch": 2,
            "lr": lr,
            "seed": seed,
            "swept": seed == 0,
            "bits": 2 + seed / 4 + lr,
            "bits_long": 3.0,
            "tokens": [32, 64],
            "seconds": [1.0 + seed, 2.0 + seed],
            "curve": [5.0, 4 + lr],
            "positions": [0, 8, 128],
            "by_position": [3.0, 2.0],
            "samples_ms": [1.0, 2.0, 3.0],
        }
        for name in NAMES
        for lr, seed in ((0.5, 0), (0.25, 0), (0.25, 1), (0.25, 2))
    ]
    lines = report.language_summary(rows)
    assert [line[0] for line in lines] == list(NAMES)
    assert lines[0][1:5] == ["1,000", "0.25 (the lowest)", "3", "2.500 (2.250 to 2.750)"]
    assert lines[0][5:] == ["3.000 (3.000 to 3.000)", "16,000", "1.0"]
    mean, low, high = plots.over_seeds(row["seconds"] for row in rows[1:4])
    assert (mean, low, high) == ([2.0, 3.0], [1.0, 2.0], [3.0, 4.0])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nowhere", "nowhere does not exist"),
        ("--size 2m", "--size is 2m; it must be one of 0.1m, 1m"),
        ("--minutes 0", "--minutes is 0; it must be above 0"),
        ("--minutes nan", "--minutes is nan"),
        ("--seeds 0", "--seeds is 0; it must be 1 or more"),
        ("--steps 0", "--steps is 0; it must be above 0"),
        ("--rates x", "--rates is x; it must be numbers"),
        ("--rates=1e-3,0", "--rates is 0.001, 0; it must be different numbers above 0"),
        ("--rates 1e-3,1e-3", "it must be different numbers"),
        ("--context=-1", "--context is -1"),
        ("--batch=-1", "--batch is -1"),
        ("--context 100000000", "the corpus has"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_command(f"bench language {words} --device cpu --out {out}".split()) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (out / "language.json").exists()


def test_the_page_states_what_its_result_holds() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "performance/language.md").read_text()
    rows = report.load(docs / "results/language.json")["rows"]
    best = {name: language_study.chosen(rows, name) for name in NAMES}
    for lr in sorted({row["lr"] for row in rows if row.get("swept")}):
        swept = [row["curve"][-1] for row in rows if row.get("swept") and row["lr"] == lr]
        cells = [f"{bits:.3f}" for bits in swept]
        bold = [f"**{cell}**" for cell in cells]
        assert any(f"| {' | '.join(words)} |" in page for words in (cells, bold))
    for key in ("bits", "bits_long"):
        values = [[row[key] for row in best[name]] for name in NAMES]
        assert f"| {' | '.join(f'{sum(x) / len(x):.3f}' for x in values)} |" in page
        assert f"| {' | '.join(f'{min(x):.3f} to {max(x):.3f}' for x in values)} |" in page
    assert f"{best['attention'][0]['tokens'][-1]:,} bytes" in page
