"""The documentation is true: the programs of its pages run, its command lines are understood, its
links lead somewhere, and its drawings and its tree of files are those of the package."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
from pages import DOCS, PROJECT, ROOT, blocks, execute, peers

from tfla import cli
from tfla.bench import roofline
from tfla.plan import Problem, plan
from tfla.xlstm import XLSTMConfig


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------- programs


# Pages with packages of others run in tests/integrations/test_docs.py, and here what stands on its
# own in them.
def runnable(page: Path) -> list[str]:
    programs = blocks(page, "python")
    if peers("\n".join(programs)):
        return [p for p in programs if p.startswith("import torch\n") and not peers(p)]
    return programs


@pytest.mark.parametrize("page", [page for page in DOCS if runnable(page)], ids=name)
def test_programs_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xLSTM 7B at a small size: the layout is the same."""
    small = XLSTMConfig(vocab_size=50304, hidden_size=64, num_layers=2, num_heads=4)
    monkeypatch.setattr(XLSTMConfig, "xlstm_7b", lambda: small)
    monkeypatch.chdir(tmp_path)
    execute(page, *runnable(page))


# ------------------------------------------------------------------------------- the command


def command_lines() -> list[str]:
    """Every line `tfla ...` of the pages, joined where it is continued."""
    lines = []
    for page in [*DOCS, *PROJECT]:
        text = "\n".join(blocks(page, "")).replace("\\\n", " ")
        lines += re.findall(r"^(?:torchrun .*?-m )?tfla (.+?) *(?:#.*)?$", text, re.MULTILINE)
    return sorted(set(lines))


@pytest.fixture(scope="module")
def command() -> Any:
    cli.complete(cli.app)
    return typer.main.get_command(cli.app)


@pytest.mark.parametrize("line", command_lines())
def test_command_line_is_understood(line: str, command: Any) -> None:
    """Every word that names a command or an option is one."""
    words = shlex.split(line)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("tfla", words, resilient_parsing=False)


# ------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as both a forge and mkdocs make them."""
    heads = re.findall(r"^#+ +(.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


# Pages that the site's hooks make: docs/hooks/site.py.
MADE = {"performance/index.md", "performance/where_we_lose.md", "reference/command.md"} | {
    f"project/{page}.md" for page in ("contributing", "architecture", "changelog")
}


def prose(page: Path) -> list[str]:
    """The lines of a page outside of its blocks of code."""
    lines, code = [], False
    for line in page.read_text("utf-8").splitlines():
        fence = line.lstrip().startswith("```")
        code ^= fence
        if not (code or fence):
            lines.append(line)
    return lines


@pytest.mark.parametrize("page", [*DOCS, *PROJECT], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
        parts = urlsplit(link)
        if parts.scheme in ("http", "https"):
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        inside = target.is_relative_to(ROOT / "docs")
        if inside and target.relative_to(ROOT / "docs").as_posix() in MADE:
            continue
        notebook = target.with_suffix(".ipynb")
        if not (target.is_file() or (inside and notebook.is_file())):
            dead.append(link)
        elif parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(target):
            dead.append(link)
    assert not dead


def test_nothing_is_left_to_fill_in() -> None:
    words = re.compile(r"^[A-Z0-9_]{4,}$|\b(?:TODO|FIXME|TBD|XXX)\b", re.MULTILINE)
    left = {name(page): words.findall("\n".join(prose(page))) for page in [*DOCS, *PROJECT]}
    assert not {page: found for page, found in left.items() if found}


def test_no_formula_is_taken_for_html() -> None:
    """A browser shows nothing of "<C, dC>": in prose it is written with &lt;."""
    eaten = {}
    for page in [*DOCS, *PROJECT]:
        text = "\n".join(line for line in prose(page) if not line.startswith("    "))
        eaten[name(page)] = re.findall(
            r"<(?=[\w/!,])(?!https?:)[^>]*>?", re.sub(r"`[^`]*`", "", text)
        )
    assert not {page: found for page, found in eaten.items() if found}


# ------------------------------------------------------------------------------- the files


def tree() -> dict[str, str]:
    """The files in the tree of ARCHITECTURE.md and what is said of each."""
    block = next(b for b in blocks(ROOT / "ARCHITECTURE.md", "text") if b.startswith("tfla/"))
    files: dict[str, str] = {}
    folders: list[str] = []
    for line in block.splitlines():
        found = re.fullmatch(r"( *)(\S+) *(.*)", line)
        assert found
        indent, file, comment = found.groups()
        folders = [*folders[: len(indent) // 2], file]
        if not file.endswith("/"):
            files["".join(folders)] = comment
    return files


def test_file_tree_is_the_package() -> None:
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tfla").rglob("*.py")}
    assert tree().keys() == here | {"tfla/py.typed"}


def test_every_file_has_a_comment() -> None:
    assert not [file for file, comment in tree().items() if len(comment) < 10]


def test_files_named_in_the_guides_for_contributors_exist() -> None:
    for page in PROJECT:
        if page.name != "CHANGELOG.md":
            named = re.findall(
                r"`((?:tfla|tests|docs|benchmarks|examples)/[\w./]*)`", page.read_text()
            )
            assert not [file for file in named if not (ROOT / file).exists()], page


# ------------------------------------------------------------------------------- drawings


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_drawings_are_up_to_date() -> None:
    """`python docs/figures/draw.py` writes them."""
    folder = ROOT / "docs/figures"
    drawn = {key: str(draw()) for key, draw in module(folder / "draw.py").DRAWINGS.items()}
    assert drawn == {path.stem: path.read_text("utf-8") for path in folder.glob("*.svg")}


def test_drawing_of_the_passes_shows_the_launches_of_a_call() -> None:
    """Those of the exponential gate on a Hopper, by the plan."""
    draw = module(ROOT / "docs/figures/draw.py")
    device = roofline.MACHINES["h200"].device
    assert device
    problem = Problem(4, 16384, 16, 128, 256, 4, False, 2, "ieee")
    launches = roofline.kernels(problem, plan(problem, device), normalize=True)
    for drawn, backward in ((draw.FORWARD, False), (draw.BACKWARD, True)):
        names = [launch for launch, *_ in drawn]
        assert sorted(names) == sorted(x.name for x in launches if x.backward is backward)


# ------------------------------------------------------------------------------- results


def test_pages_of_results_hold_their_numbers() -> None:
    """Every comparison on them is made of two medians of one result; ours is the slower one."""
    results = module(ROOT / "docs/hooks/results.py")
    losses = results.losses()
    assert losses and all(loss.ratio > 1 for loss in losses)
    for page in (results.results_page(), results.losses_page()):
        assert not re.search(r"\bnan\b|\bNone\b", page)
    kernels = {
        (t.implementation, t.setup, t.part): t.ms
        for t in results.times(results.load("gpu-kernels"))
    }
    ours = kernels["tfla sigmoid", "4 x 16,384, 16 heads 128/256", "forward"]
    assert f" {results.three(ours)} / " in results.results_page()
