"""The command: help that explains, one line for what the caller can put right, results as asked."""

import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from commands import Call
from matplotlib.figure import Figure

import tfla
from tfla import cli, demo, render
from tfla.errors import RunError
from tfla.xlstm import XLSTMConfig, checkpoint
from tfla.xlstm.run import TrainOptions
from tfla.xlstm.train import read_metrics

COMMANDS = ["train", "generate", "chat", "eval", "export", "plot", "demo"]
FUNCTIONS = {"eval": "evaluate"}
TINY = "--hidden-size 16 --num-layers 1 --num-heads 2 --context 32 --batch 2 --eval-bytes 500"


pytestmark = pytest.mark.usefixtures("wide")


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps, enough for it to write letters."""
    out = tmp_path_factory.mktemp("runs") / "first"
    line = f"train {text} --out {out} {TINY} --steps 40 --lr 2e-2 --log-every 10"
    line += " --save-every 10 --eval-every 20"
    assert cli.run_command(line.split()) == 0
    return out


# ------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_gives_an_example(name: str, call: Call) -> None:
    status, out, _ = call(f"{name} --help")
    assert status == 0
    assert f"Example: tfla {name}" in out
    shown = " ".join(out.replace("│", " ").split())
    parameters = inspect.signature(
        getattr(cli, FUNCTIONS.get(name, name)), eval_str=True
    ).parameters
    for parameter in parameters.keys() - {"command"}:
        [option] = parameters[parameter].annotation.__metadata__
        assert len(option.help.split()) >= 3, f"{parameter} is not explained"
        assert option.help.replace("\\", "") in shown
        if isinstance(option, typer.models.OptionInfo):
            assert f" --{parameter.replace('_', '-')} " in shown


def test_the_defaults_shown_are_those_of_the_library() -> None:
    parameters = inspect.signature(cli.train).parameters
    for name, value in vars(TrainOptions(steps=1)).items():
        if name not in ("steps", "seconds"):
            assert parameters[name].default == value, name


def test_help_names_every_command_and_is_what_the_bare_command_prints(call: Call) -> None:
    status, out, _ = call("--help")
    assert status == 0
    assert all(re.search(rf"│ {name} ", out) for name in COMMANDS)
    assert call("")[:2] == (0, out)
    assert call("--version")[:2] == (0, f"tfla {tfla.__version__}\n")


def test_a_group_without_its_command_shows_what_there_is(call: Call) -> None:
    status, out, err = call("bench")
    assert status == 2 and "kernels" in out + err
    assert err.endswith("tfla: a command is missing; see tfla bench --help\n")


def test_python_m_tfla_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tfla", "nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tfla: No such command 'nonsense'")
    assert done.stderr.count("\n") == 1 and not done.stdout


# ------------------------------------------------------------------------------- errors


def is_one_line(result: tuple[int, str, str], *parts: str) -> None:
    status, _, err = result
    assert status == 2, err
    assert err.startswith("tfla: ") and err.endswith("\n") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("trian", ["No such command 'trian'", "see tfla --help"]),
        ("train --stps 3", ["--stps", "see tfla train --help"]),
        ("train --steps many", ["'--steps'", "integer", "see tfla train --help"]),
        ("train --steps", ["--steps", "see tfla train --help"]),
        ("train --steps 0", ["--steps is 0; it must be above 0"]),
        ("train --batch 0", ["--batch is 0; it must be at least 1"]),
        ("train --held-out 2", ["--held-out is 2.0; it must be above 0 and at most 0.5"]),
        (f"train --hidden-size {10**30}", ["--hidden-size must be below 2^31; got 1000"]),
        (f"train --num-layers {10**400}", ["--num-layers must be below 2^31; got 1000"]),
        (
            "train words --num-layers 2000000000 --context 8",
            ["a model of ", " GB of memory; take a smaller model"],
        ),
        ("train --hidden-size 30 --num-heads 4", ["--hidden-size", "--num-heads = 4"]),
        ("train --input-gate relu", ["--input-gate", "'relu'", "'exp' or 'sigmoid'"]),
        ("train --device cpo", ["--device is cpo; it must be auto, cpu, cuda or cuda:1"]),
        ("train --device cuda:99", ["--device is cuda:99", "take --device auto"]),
        ("train --device meta", ["--device is meta", "take --device auto"]),
        ("train --device xpu", ["--device is xpu", "take --device auto"]),
        (f"train --seed {2**63}", [f"--seed is {2**63}; it must be from 0 to 2^63 - 1"]),
        ("train --precision int8", ["--precision is int8; it must be auto, fp32 or bf16"]),
        ("train nowhere", ["nowhere does not exist; name files or folders"]),
        ("train empty", ["the corpus is empty: no bytes in empty"]),
        ("train tiny", ["one window takes 257", "give more files or a smaller --context"]),
        ("train tiny --tokenizer no.json", ["no.json cannot be read", "give a tokenizer.json"]),
        ("train tiny --tokenizer /dev/zero", ["/dev/zero is not a file"]),
        ("train tiny --tokenizer tiny", ["tiny is not a file"]),
        ("train tiny --tokenizer tiny/text", ["the tokenizer cannot be read"]),
        ("train tiny --out tiny/text/run", ["tiny/text", "check the path"]),
        ("generate", ["Missing argument", "see tfla generate --help"]),
        ("generate nowhere", ["nowhere does not exist; name the folder"]),
        ("generate empty", ["empty holds no checkpoint; name the folder"]),
        ("generate RUN x --file tiny/text", ["a prompt and --file are both given"]),
        ("generate RUN --file no.txt", ["no.txt: No such file", "check the path"]),
        ("generate RUN x --temperature -1", ["temperature must be finite and at least 0"]),
        ("generate RUN x --top-k 0", ["top_k must be at least 1"]),
        ("generate RUN x --top-p 1.5", ["top_p must be in (0, 1]"]),
        ("generate RUN x --tokens 0", ["--tokens is 0; it must be at least 1"]),
        (f"generate RUN x --seed {2**63}", [f"--seed is {2**63}; it must be from 0"]),
        ("generate tiny x", ["tiny holds no checkpoint"]),
        ("eval RUN nowhere", ["nowhere does not exist"]),
        ("eval RUN empty", ["no text in the files that are named"]),
        ("eval RUN --include *.py", ["--include is for the files of folders"]),
        ("eval RUN tiny --context 0", ["--context is 0; it must be from 1"]),
        ("eval RUN tiny --precision int8", ["--precision is int8; it must be auto, fp32 or bf16"]),
        ("export RUN new", ["qk_dim_factor is 8", "multiple of 64"]),
        ("export RUN tiny", ["tiny is not an empty folder"]),
        ("plot empty", ["empty holds no metrics.jsonl of a run"]),
        ("plot RUN --over tokens", ["--over is tokens; it must be seconds or steps"]),
        ("plot RUN --out tiny/text", ["tiny/text is not a file that tfla wrote"]),
        ("train --size huge", ["--size is huge; it must be one of tiny, small, medium, large, xl"]),
        ("train tiny --init nowhere", ["nowhere does not exist; name the folder"]),
        ("train tiny --init RUN --size small", ["--hidden-size is not what", "leave it out"]),
        ("demo --seconds 0", ["--seconds is 0.0; it must be above 0"]),
        ("demo --out RUN", ["holds a run already"]),
    ],
)
def test_what_the_caller_can_put_right_is_one_line(
    line: str,
    parts: list[str],
    call: Call,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "text").write_text("a few words")
    (tmp_path / "words").write_text("a few words " * 40)
    is_one_line(call(line.replace("RUN", str(trained))), *parts)


def test_a_run_is_not_overwritten_and_not_changed(call: Call, trained: Path, text: Path) -> None:
    before = checkpoint.load(trained).path
    is_one_line(call(f"train {text} --out {trained}"), "holds a run already; add --resume")
    other = call(f"train --out {trained} --resume --hidden-size 32")
    is_one_line(other, "--hidden-size is not what the run", "leave it out")
    other = call(f"train {text / 'decoder.py'} --out {trained} --resume")
    is_one_line(other, "tfla: the files to train on are not what the run", "leave them out")
    assert checkpoint.load(trained).path == before


@pytest.mark.parametrize("line", ["train --resume --out RUN", "generate RUN x"])
def test_a_damaged_checkpoint_is_named(line: str, call: Call, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call(f"train {text} --out {out} {TINY} --steps 2 --save-every 1")[0] == 0
    file = checkpoint.load(out).path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    is_one_line(call(line.replace("RUN", str(out))), f"{file} is damaged", "to go back to")
    file.write_bytes(data[:100])
    is_one_line(call(line.replace("RUN", str(out))), f"{file} is damaged: 100 of {len(data)}")


@pytest.mark.parametrize("package", ["typer", "matplotlib", "safetensors"])
def test_a_missing_extra_is_named_with_the_line_that_brings_it(
    package: str, text: Path, tmp_path: Path
) -> None:
    """In a folder of its own each package is there but for the one that a finder denies."""
    program = f"""
import importlib.abc, sys
import torch
class Deny(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "{package}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
for name in [name for name in sys.modules if name.split(".")[0] == "{package}"]:
    del sys.modules[name]
sys.meta_path.insert(0, Deny())
from tfla.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "train", str(text), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    is_one_line((done.returncode, done.stdout, done.stderr), package, "pip install '.[train]'")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- train


def test_train_leaves_metrics_a_curve_and_checkpoints(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["event"] == "train"]
    assert steps == [10, 20, 30, 40]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [20, 40]
    assert all(2 < line["bits_per_byte"] < 9 for line in lines if line["event"] == "eval")
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    folders = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert folders == ["step-00000030", "step-00000040"]


def test_resume_takes_the_options_of_the_run(call: Call, text: Path, tmp_path: Path) -> None:
    line = f"train {text} --out {tmp_path / 'run'} {TINY} --lr 1e-3 --log-every 1"
    assert call(f"{line} --steps 2")[0] == 0
    status, out, _ = call(f"train --out {tmp_path / 'run'} --resume --steps 4")
    assert status == 0
    assert "from step 2 on" in out
    saved = checkpoint.load(tmp_path / "run")
    assert saved.meta["step"] == 4
    assert saved.meta["options"]["lr"] == 1e-3 and saved.meta["config"]["hidden_size"] == 16


def test_names_of_files_are_no_markup_and_no_formulas(
    call: Call, text: Path, tmp_path: Path
) -> None:
    source, run = tmp_path / "x $a_{ [/b] [red]", tmp_path / "run mit ü [/v1] $x"
    shutil.copytree(text, source)
    status, out, _ = call(f"train {TINY} --steps 1 --out", str(run), str(source))
    assert status == 0 and str(run) in out and str(source) in out
    hint = next(words for words in out.splitlines() if words.startswith("let it write"))
    assert shlex.split(hint.partition(": ")[2])[2] == str(run)
    assert (run / "loss.png").exists()


def test_a_corpus_too_small_for_a_window_leaves_no_run(
    call: Call, text: Path, tmp_path: Path
) -> None:
    """The same line with more files, or a smaller window, has to work."""
    (tmp_path / "tiny").write_text("a few words, and some more of them")
    line = f"train {tmp_path / 'tiny'} --out {tmp_path / 'run'} {TINY} --steps 1"
    assert call(f"{line} --context 100")[0] == 2
    assert call(f"{line} --context 8")[0] == 0


def test_damaged_metrics_do_not_stop_a_run(call: Call, text: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    line = f"train {text} --out {tmp_path / 'run'} {TINY} --log-every 1"
    assert call(f"{line} --steps 2")[0] == 0
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"\0\xff\n" + lines[0] + b"{}\n[]\n")
    assert call(f"train --out {tmp_path / 'run'} --resume --steps 4")[0] == 0
    assert [r["step"] for r in read_metrics(metrics) if r["event"] == "train"] == [1, 3, 4]
    metrics.unlink()
    status, out, _ = call(f"train --out {tmp_path / 'run'} --resume")
    assert status == 0 and "not in metrics.jsonl" in out


def test_resume_without_a_checkpoint_says_that_it_starts(
    call: Call, text: Path, tmp_path: Path
) -> None:
    """Without the paths of the run it would otherwise read the standard library in silence."""
    line = f"train {text} --out {tmp_path / 'run'} {TINY} --steps 1 --resume"
    assert "holds no checkpoint; starting at the beginning" in call(line)[2]
    assert call(line)[2] == ""


def test_an_interrupted_run_says_how_to_go_on(
    call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(records: Iterator[object], *_: object) -> None:
        for _ in range(3):
            next(records)
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(render, "watch", interrupted)
        line = f"train {text} --out {out} {TINY} --steps 4 --log-every 1 --save-every 1"
        status, _, err = call(line)
    assert status == 130
    assert err == f"tfla: stopped; go on with: tfla train --out {out} --resume\n"
    assert call(f"train --out {out} --resume")[0] == 0
    assert checkpoint.load(out).meta["step"] == 4


# ------------------------------------------------------------------------------- what is another's


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("line", ["train data --out . --steps 2", "demo --out . --seconds 1"])
@pytest.mark.parametrize(
    "name",
    ["data/thesis.tex", "metrics.jsonl", "loss.png", "checkpoints", ".tfla-lock", "data"],
)
def test_a_project_folder_is_left_as_it_is(
    line: str, name: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MODEL", {"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    if name != "data" or line.startswith("demo"):
        line = line.replace("train data", "train texts")
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.txt").write_text("some words\n" * 400)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    else:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "a.txt").write_text("some words\n" * 400)
        (tmp_path / "data" / "thesis.tex").write_text("years of work")
    for torn in (".x.tmp", "checkpoints.bak/.step-00000001.1.tmp", "step-30"):
        (tmp_path / torn).mkdir(parents=True)
        (tmp_path / torn / "model.safetensors").write_text("mine")
    before = contents(tmp_path)
    is_one_line(call(line), name.split("/")[0], "move it away")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["context.png", "demo.md"])
def test_demo_overwrites_no_other_plot(
    name: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("mine")
    is_one_line(call("demo --out . --seconds 1"), name, "move it away")
    assert contents(tmp_path) == {name: b"mine"}


def test_names_like_ours_beside_a_run_stay(call: Call, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    names = (".x.tmp", "step-30", "checkpoints/step-30", "checkpoints/.step-00000002.9.tmp")
    for name in names:
        (out / name).mkdir(parents=True)
        (out / name / "thesis.tex").write_text("mine")
    line = f"train {text} --out {out} {TINY} --save-every 1"
    assert call(f"{line} --steps 4")[0] == 0
    assert call(f"train --out {out} --resume --steps 6")[0] == 0
    assert all((out / name / "thesis.tex").read_text() == "mine" for name in names)


@pytest.mark.parametrize("name", ["loss.png", "metrics.jsonl"])
def test_a_file_of_another_in_a_run_is_not_overwritten(
    name: str, call: Call, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert call(f"train {text} --out {out} {TINY} --steps 2")[0] == 0
    (out / name).write_bytes(b"\x89PNG\r\n\x1a\nmine")
    is_one_line(call(f"train --out {out} --resume --steps 4"), name, "move it away")
    assert (out / name).read_bytes() == b"\x89PNG\r\n\x1a\nmine"
    (out / name).unlink()
    assert call(f"train --out {out} --resume --steps 4")[0] == 0


def test_a_plot_of_an_earlier_version_is_kept_under_another_name(
    call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def unsigned(figure: Figure, path: Path) -> None:
            figure.savefig(path)

        patch.setattr(render, "_finish", unsigned)
        assert call(f"train {text} --out {out} {TINY} --steps 2")[0] == 0
    old = (out / "loss.png").read_bytes()
    status, _, err = call(f"train --out {out} --resume --steps 4")
    assert status == 0 and f"it is now {out}/loss-1.png" in err
    assert (out / "loss-1.png").read_bytes() == old != (out / "loss.png").read_bytes()
    assert call(f"train --out {out} --resume --steps 5")[2] == ""


def test_a_run_that_another_process_writes_is_left_alone(
    call: Call, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = f"train {text} --out {out} {TINY} --save-every 1 --log-every 1"
    first = subprocess.Popen(
        [sys.executable, "-m", "tfla", *f"{line} --steps 100000".split()],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while not checkpoint.exists(out):
            assert first.poll() is None
            time.sleep(0.05)
        for words in (f"{line} --steps 3", f"train --out {out} --resume", f"demo --out {out}"):
            is_one_line(call(words), f"{out} is in use by process {first.pid} on ", " since ")
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    steps = {path.name: path for path in (out / "checkpoints").glob("step-*")}
    last = int(max(steps).removeprefix("step-"))
    assert call(f"train --out {out} --resume --steps {last + 3}")[0] == 0
    assert not (out / ".tfla-lock").exists()
    recorded = [r["step"] for r in read_metrics(out / "metrics.jsonl") if r["event"] == "train"]
    assert recorded == list(range(1, last + 4))


# ------------------------------------------------------------------------------- generate


def test_the_same_seed_writes_the_same_text(call: Call, trained: Path) -> None:
    texts = [call(f"generate {trained} import --tokens 40 --seed {seed}")[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("import") and texts[0].endswith("\n")
    free = [call(f"generate {trained} import --tokens 40")[1] for _ in range(2)]
    assert free[0] != free[1]
    greedy = [
        call(f"generate {trained} import --tokens 20 --temperature 0 --seed {n}") for n in "12"
    ]
    assert greedy[0] == greedy[1]


def test_a_prompt_comes_as_argument_from_a_file_or_from_a_pipe(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "größer "
    (tmp_path / "prompt").write_text(prompt, "utf-8")
    options = f"generate {trained} --tokens 20 --seed 3"
    whole = call(options, prompt)
    assert whole[0] == 0 and whole[1].startswith(prompt)
    assert call(f"{options} --file {tmp_path / 'prompt'}") == whole
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(prompt.encode())))
    assert call(f"{options} -") == whole


def test_it_stops_before_a_stop_text(call: Call, trained: Path) -> None:
    options = f"generate {trained} x --tokens 60 --seed 5"
    whole = call(options)[1][:-1]
    stop = whole[20:23]
    assert call(options, "--stop", stop)[1] == whole[: whole.index(stop, 1)] + "\n"
    is_one_line(call(options, "--stop", ""), "--stop is empty")


def test_a_checkpoint_folder_can_be_named(call: Call, trained: Path) -> None:
    options = "x --tokens 20 --seed 5"
    last = call(f"generate {trained}/checkpoints/step-00000040 {options}")
    assert last == call(f"generate {trained} {options}")
    assert last != call(f"generate {trained}/checkpoints/step-00000030 {options}")


def test_a_closed_pipe_ends_it_in_silence(trained: Path) -> None:
    line = f"generate {trained} x --tokens 3000"
    process = subprocess.Popen(
        [sys.executable, "-m", "tfla", *line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(900) == 1
    process.stderr.close()


def test_a_tokenizer_works_from_files_to_text(call: Call, text: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    bpe.train([str(text / "decoder.py")], trainer)
    file = tmp_path / "tokenizer.json"
    bpe.save(str(file))
    out = tmp_path / "run"
    options = f"train {text} --out {out} --tokenizer {file} {TINY}"
    assert call(f"{options} --steps 2")[0] == 0
    file.rename(tmp_path / "moved.json")  # the run has its own copy
    assert call(f"train --out {out} --resume --steps 3")[0] == 0
    assert checkpoint.load(out).meta["config"]["vocab_size"] == 301
    status, written, _ = call(f"generate {out} --tokens 30 --seed 1", "def scan")
    assert status == 0 and written.startswith("def scan") and len(written) > 20
    other = call(f"train --out {out} --resume --tokenizer {tmp_path / 'moved.json'} --steps 4")
    assert other[0] == 0
    (tmp_path / "moved.json").write_text(file.name)
    changed = call(f"train --out {out} --resume --tokenizer {tmp_path / 'moved.json'}")
    is_one_line(changed, "--tokenizer is not what the run")


# ------------------------------------------------------------------------------- what comes after


@pytest.fixture(scope="module")
def exported(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose widths transformers can hold, and its export."""
    out = tmp_path_factory.mktemp("wide") / "run"
    line = f"train {text} --out {out} {TINY} --hidden-size 128 --steps 20 --eval-every 10"
    assert cli.run_command([*line.split(), "--log-every", "10"]) == 0
    assert cli.run_command(["export", str(out), str(out.parent / "exported")]) == 0
    return out, out.parent / "exported"


def test_an_exported_run_writes_and_is_scored_as_the_run(
    call: Call, text: Path, exported: tuple[Path, Path]
) -> None:
    written, scored = [], []
    for folder in exported:
        assert call(f"generate {folder} --tokens 30 --seed 1", "größer ")[0] == 0
        written.append(call(f"generate {folder} --tokens 30 --seed 1", "def ")[1])
        scored.append(call(f"eval {folder} {text} --context 32 --each"))
    assert written[0] == written[1] and scored[0] == scored[1]
    status, out, err = scored[0]
    names = sorted(path.name for path in text.iterdir())
    rows = [line.split() for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [row[0] for row in rows[1:-1]] == [*names, "all"]
    bits = {row[0]: float(row[3]) for row in rows[1:-1]}
    sizes = {path.name: path.stat().st_size for path in text.iterdir()}
    mean = sum(bits[name] * sizes[name] for name in names) / sum(sizes.values())
    assert bits["all"] == pytest.approx(mean, abs=2e-3) and 2 < mean < 8
    assert "no run and holds no text" in call(f"eval {exported[1]}")[2]


def test_eval_without_files_is_of_the_text_that_was_held_out(
    call: Call, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """As the run was judged, whose evaluations read as much as there is."""
    run = exported[0]
    shutil.copytree(run, tmp_path / "run")
    line = f"train --out {tmp_path / 'run'} --resume --steps 22 --eval-bytes 1000000"
    assert call(line)[0] == 0
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["bits_per_byte"]
    status, out, _ = call(f"eval {tmp_path / 'run'}")
    assert status == 0 and "in windows of 32 tokens" in out
    assert float(out.splitlines()[1].split()[-3]) == pytest.approx(last, abs=0.02)


def test_chat_goes_on_with_each_line_and_forgets_at_new(
    call: Call, exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(lines: bytes) -> str:
        stdin = SimpleNamespace(buffer=io.BytesIO(lines), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)
        status, out, err = call(f"chat {exported[0]} --tokens 12 --temperature 0")
        assert (status, err) == (0, "")
        return out

    first = talk(b"import os\n")
    assert first.endswith("\n") and len(first) > 5
    again = talk(b"import os\n/new\nimport os\n")
    assert again == first * 2
    assert talk(b"import os\nimport os\n").startswith(first)
    assert talk(b"") == ""


def test_fine_tuning_starts_where_the_other_run_ended(
    call: Call, text: Path, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    for number, source in enumerate(exported):
        out = tmp_path / f"{number}"
        line = f"train {text} --out {out} --init {source} --steps 2 --context 32 --batch 2"
        status, said, _ = call(line)
        assert status == 0 and f"with the weights of {source}, into" in said
        saved = checkpoint.load(out)
        assert saved.meta["config"]["hidden_size"] == 128 and saved.meta["init"] == str(source)
        assert call(f"train --out {out} --resume --steps 3")[0] == 0
        assert call(f"generate {out} x --tokens 5")[0] == 0


def test_a_size_is_a_shape_and_an_option_beside_it_counts(
    call: Call, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = f"train {text} --out {out} --size medium --num-layers 1 --num-heads 8 --hidden-size 64"
    assert call(f"{line} --steps 1 --context 16 --batch 1 --eval-bytes 100")[0] == 0
    config = checkpoint.load(out).meta["config"]
    assert [config[x] for x in ("hidden_size", "num_layers", "num_heads")] == [64, 1, 8]
    for name, (shape, words) in cli.SIZES.items():
        number = XLSTMConfig(vocab_size=257, **shape).num_parameters() / 1e6
        assert float(words.removesuffix("M")) == pytest.approx(number, rel=0.03), name


def test_the_curve_is_drawn_at_evaluations(
    call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, finish = [], render._finish

    def counted(figure: Figure, path: Path) -> None:
        drawn.append(len(read_metrics(tmp_path / "run" / "metrics.jsonl")))
        finish(figure, path)

    monkeypatch.setattr(render, "_finish", counted)
    monkeypatch.setattr(render, "REDRAWING", 1e9)
    line = f"train {text} --out {tmp_path / 'run'} {TINY} --steps 3 --eval-every 1"
    assert call(f"{line} --log-every 1")[0] == 0
    assert drawn == [2, 4, 6, 6]  # records that it shows; the last one when the run has ended


def test_drawing_takes_little_of_the_time() -> None:
    """On a clock that steps and drawings move."""
    now, drawn = [0.0], []

    def draw() -> None:
        now[0] += 1.0
        drawn.append(now[0])

    def records() -> Iterator[dict[str, str]]:
        for _ in range(1000):
            now[0] += 1.0
            yield {"event": "eval"}
            yield {"event": "train"}

    assert len(list(render.redrawn(records(), draw, lambda: now[0]))) == 2000
    assert drawn[0] == 2.0  # the first one at once
    assert 1000 * render.REDRAWING * 0.8 < len(drawn) <= 1000 * render.REDRAWING + 1


def test_losses_of_a_line_have_one_unit(call: Call, text: Path, tmp_path: Path) -> None:
    _, out, _ = call(f"train {text} --out {tmp_path / 'run'} {TINY} --steps 4 --eval-every 4")
    [words] = [line for line in out.splitlines() if line.startswith("step 4")]
    losses = re.findall(r"(training|held-out) (\d+\.\d{3}) bits/byte", words)
    assert [name for name, _ in losses] == ["training", "held-out"]
    loss = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"] / 0.693147
    assert float(losses[0][1]) == pytest.approx(loss, abs=2e-3)


def test_plot_draws_one_run_and_several(
    call: Call, trained: Path, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    runs = f"{trained} {exported[0]}"
    target = tmp_path / "both.png"
    assert call(f"plot {runs} --out {target}")[:2] == (0, f"{target}\n")
    first = target.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert call(f"plot {runs} --out {target} --over steps")[0] == 0
    assert target.read_bytes() != first
    shutil.copytree(trained, tmp_path / "one $a_{")
    assert call("plot", str(tmp_path / "one $a_{"))[0] == 0


def test_runs_of_two_units_are_not_drawn_in_one(tmp_path: Path) -> None:
    def curve(unit: str) -> render.LossCurve:
        common = {"step": 1, "progress": 1.0, "elapsed": 1.0}
        return render.LossCurve(unit, [{"event": "eval", **common, unit: 3.0}], 1.0)

    pair = [curve("bits_per_byte"), curve("bits_per_token")]
    with pytest.raises(RunError, match="bits_per_byte is in bits per byte and bits_per_token is"):
        render.loss_curves(pair, tmp_path / "x.png")
    for one in pair:
        render.loss_curves([one, one], tmp_path / "x.png")


# ------------------------------------------------------------------------------- demo


def test_demo_leaves_two_plots_and_a_table(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MODEL", {"hidden_size": 16, "num_layers": 1, "num_heads": 2})
    status, out, _ = call("demo --seconds 2")
    assert status == 0
    folder = tmp_path / "runs" / "demo"
    for name in ("loss.png", "context.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    report = (folder / "demo.md").read_text()
    bits, zipped = map(float, re.findall(r"(?:: |same: )(\d\.\d+)", report))
    assert 2 < bits < 8.1 and 1.5 < zipped < 4
    assert f"{bits:.3f} bits per byte; gzip -9 on the same: {zipped:.3f}" in out
    rows = [line.split("|")[1:-1] for line in report.splitlines() if re.match(r"\| \d", line)]
    measured = [int(row[0].replace(",", "")) for row in rows]
    assert measured and measured == demo.CONTEXTS[: len(measured)]
    assert demo.PROMPT in out
    shown = out.split("4. What this has shown")[1].splitlines()
    assert sum(line.startswith("- ") for line in shown) == 5
    said = re.search(r"needs (\d\.\d\d) bits a byte .* gzip -9 (\d\.\d\d)\.", shown[1])
    assert said is not None
    # Both are the same numbers, rounded once more than in the report.
    assert [float(x) for x in said.groups()] == pytest.approx([bits, zipped], abs=0.0056)
    assert demo._free_folder(folder).name == "demo-2"


def test_the_comparison_keeps_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each call moves by what it would cost, whatever the machine."""
    now = [0.0]
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])

    def costs(seconds: Callable[[int], float]) -> Callable[[int, object], Callable[[], None]]:
        def probe(T: int, device: object) -> Callable[[], None]:
            def once() -> None:
                now[0] += seconds(T)

            return once

        return probe

    free = costs(lambda T: 1e-6)
    pair = {
        "mLSTM": (costs(lambda T: T * 1e-4), free, lambda T: 1, 2.0),
        "attention": (costs(lambda T: T * T * 1e-7), free, lambda T: T, 4.0),
    }
    monkeypatch.setattr(demo, "PAIR", pair)
    rows = demo.compare([2**n for n in range(8, 17)], 20.0, torch.device("cpu"))
    assert now[0] < 20.0
    assert [row["mLSTM"]["train"] for row in rows] == pytest.approx([1e-4] * len(rows))
    measured = [row["context"] for row in rows if row["attention"] is not None]
    assert measured == [2**n for n in range(8, 8 + len(measured))]
    assert 2**12 <= measured[-1] < rows[-1]["context"]


def test_what_the_demo_says_at_its_end_is_what_it_measured() -> None:
    """Where it did not learn, or attention was not reached, it does not claim to have."""

    def row(T: int, ours: float, attention: float | None) -> demo.Row:
        other = {"train": attention, "next": 1e-4, "bytes": 2048 * T}
        mlstm = {"train": ours, "next": 2e-4, "bytes": 65536}
        return {"context": T, "mLSTM": mlstm, "attention": other if attention else None}

    rows = [row(256, 2e-5, 1e-5), row(512, 2e-5, 2e-5), row(1024, 3e-5, None)]
    said = demo.findings(150, rows, bits=1.5, short=1.6, zipped=1.8, size=1000)
    assert [line.split()[:3] for line in said[:2]] == [
        ["It", "learns:", "after"],
        ["Its", "state", "is"],
    ]
    assert "of 1,024 tokens each costs 1.5 times what each of 256 does" in said[2]
    assert "each of 512 costs 2.0 times what each of 256 does, and 1.0 times the mLSTM's" in said[2]
    assert "64 KiB" in said[3] and "1,024 KiB after 512 tokens" in said[3]
    assert "200 us after 512 tokens, 200 after 256; attention 100 and 100" in said[4]
    worse = demo.findings(1, [row(256, 2e-5, None)], bits=8.1, short=8.0, zipped=9.0, size=10)
    assert len(worse) == 2 and worse[0].startswith("It has not learnt")
    assert worse[1].startswith("Its state was of no use")


def test_plots_are_drawn_from_few_and_from_no_evaluations(tmp_path: Path) -> None:
    trained = {"event": "train", "elapsed": 1.0, "loss": 5.0, "tokens_per_second": 1.0}
    for records in ([], [trained], [trained, {"event": "eval", "elapsed": 2, "bits_per_byte": 7}]):
        render.loss_curve(records, tmp_path / "loss.png", title="few")
    assert os.path.getsize(tmp_path / "loss.png") > 5000
    assert render.clock(3725.4) == "1:02:05" and render.clock(65) == "1:05"


def test_help_names_the_input_gates_as_the_registry_does() -> None:
    """It comes without torch, and so without the registry."""
    from tfla import cli, gates

    assert gates.described() in Path(cli.__file__).read_text("utf-8")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names that are no UTF-8")
@pytest.mark.parametrize("name", ["a$x_{$b", "[/v1]", "[bold]", ":smile:", os.fsdecode(b"\xff")])
def test_any_name_may_stand_in_a_path(name: str, call: Call, text: Path, tmp_path: Path) -> None:
    source, out = tmp_path / name, tmp_path / f"run{name}"
    source.mkdir(parents=True)
    for path in text.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    words = [*TINY.split(), "--steps", "2", "--device", "cpu", "--threads", "1"]
    status, said, err = call("train", str(source), "--out", str(out), *words)
    assert (status, err) == (0, "")
    shown = name.encode("utf-8", "replace").decode()
    assert said.startswith("corpus ") and f"{shown}: " in said.splitlines()[0]
    assert (out / "loss.png").stat().st_size
    assert call("train", "--out", str(out), "--resume")[0] == 0


def test_an_unknown_backend_of_matplotlib_does_not_matter(text: Path, tmp_path: Path) -> None:
    words = ["train", str(text), "--out", str(tmp_path), *TINY.split(), "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tfla", *words, "--device", "cpu", "--threads", "1"],
        env=os.environ | {"MPLBACKEND": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors")
@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_change_nothing(closed: str, tmp_path: Path) -> None:
    for words, status in (("--version", 0), (f"generate {tmp_path}", 2)):
        line = f"{sys.executable} -m tfla {words} {closed}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        silent = ">&-" in closed.split() or status
        assert done.stdout == ("" if silent else f"tfla {tfla.__version__}\n")


def test_the_table_of_sizes_is_of_the_models(root: Path) -> None:
    """Its parameters, and its speeds as far as they are computed."""
    page = (root / "docs/train/sizes.md").read_text("utf-8")
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows if row[0].split()[0] in cli.SIZES]
    assert [row[0].split()[0] for row in rows] == list(cli.SIZES)

    def speed(cell: str) -> float:
        return float(cell.replace("*", "").partition(";")[0].replace(",", ""))

    flops = []
    for (shape, _), row in zip(cli.SIZES.values(), rows, strict=True):
        config = XLSTMConfig(vocab_size=257, **shape)
        widths = ", ".join(str(shape[x]) for x in ("hidden_size", "num_layers", "num_heads"))
        assert row[1:3] == [widths, f"{config.num_parameters():,}"]
        flops.append(config.flops_per_token(training=True))
    measured = speed(rows[0][3]) * flops[0]  # FLOP/s on 2 cores
    assert measured == pytest.approx(110e9, rel=0.01)
    for number, row in zip(flops, rows, strict=True):
        for cell, rate in zip(row[3:], (measured, 4 * measured, 282e12), strict=True):
            if cell:
                assert speed(cell) == pytest.approx(rate / number, rel=0.03), row[0]
                night = cell.replace("*", "").split("; ")[1]
                size = {"M": 1e6, "G": 1e9}[night[-1]]
                tokens = float(night[:-1].replace(",", "")) * size
                assert tokens == pytest.approx(8 * 3600 * rate / number, rel=0.05), row[0]


@pytest.mark.parametrize(
    "name",
    [*COMMANDS, "env", "roofline", "plan", "bench"]
    + [f"bench {x}" for x in "kernels memory decode model transfer bias compare draw".split()],
)
def test_help_fits_80_columns_and_says_defaults_in_words(
    name: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = call(f"{name} --help")
    assert status == 0 and out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    shown = " ".join(out.replace("│", " ").split())
    assert not re.findall(r"\[default: (\(|None|\])", shown)
    assert "\\[" not in out
