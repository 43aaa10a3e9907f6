"""What mkdocs does for this site beside its own work: pages that are generated, drawings that
follow light and dark, and a check that no link is dead and that nothing is fetched."""

from __future__ import annotations

import html
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import commands  # noqa: E402
import notebooks  # noqa: E402
import results  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository's root that are pages of the site too.
PROJECT = {f"{name.upper()}.md": name for name in ("contributing", "architecture", "changelog")}


# ---------------------------------------------------------------- pages that are generated


def on_files(files: Files, config: Any) -> Files:
    pages = {
        "performance/index.md": results.results_page(),
        "performance/where_we_lose.md": results.losses_page(),
        "reference/command.md": commands.page(),
    }
    pages |= {f"project/{page}.md": project_page(name) for name, page in PROJECT.items()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        files.remove(file)
        page, pictures = notebooks.convert(ROOT / "docs" / file.src_uri)
        path = file.src_uri.removesuffix(".ipynb")
        files.append(File.generated(config, f"{path}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"{path}_files/{name}", content=picture))
    return files


def project_page(name: str) -> str:
    """A file of the root as a page: links into docs/ stay links, those to code become names."""

    def moved(match: re.Match[str]) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        if target in PROJECT:
            return f"[{text}]({PROJECT[target]}.md)"
        if target.startswith("docs/"):
            return f"[{text}](../{target.removeprefix('docs/')})"
        return text if text.startswith("`") else f"{text} (`{target}`)"

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", moved, (ROOT / name).read_text())


# ---------------------------------------------------------------- tables and drawings


def on_page_content(content: str, **_: Any) -> str:
    """Pairs of numbers in tables stay on one line, and drawings become part of their page."""
    return drawn(re.sub(r"<td.*?</td>", lambda cell: unbroken(cell[0]), content, flags=re.DOTALL))


def unbroken(cell: str) -> str:
    """The cell of a table with "0.66 / 2.32" on one line."""
    return re.sub(r"(?<=\d) / (?=\d)", "&nbsp;/&nbsp;", cell)


def drawn(content: str) -> str:
    """A drawing becomes part of its page, where it has the colours of the page."""

    def inlined(match: re.Match[str]) -> str:
        about = html.unescape(match[1])
        drawing = (ROOT / "docs/figures" / match[2]).read_text()
        drawing = re.sub(r"<\?xml.*?\?>\s*", "", drawing)
        label = html.escape(about, quote=True)
        drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        return f'<figure class="drawing">{drawing}</figure>'

    return re.sub(r'<img alt="([^"]*)" src="[^"]*figures/([\w.-]+\.svg)" ?/?>', inlined, content)


# ---------------------------------------------------------------- links


class Page(HTMLParser):
    """The links of a page, the names that links may end at, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        loads = given.get("src") or (given.get("href") if tag == "link" else None)
        if loads:
            self.fetched.append(loads)
            self.links.append(loads)


def dead_links(folder: Path) -> list[str]:
    """Links of a built site that lead nowhere, and what it would fetch from elsewhere."""
    pages = {path: Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute, for a server
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.fetched and parts.scheme != "data":
                    found.append(f"{path.relative_to(folder)}: fetches {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{path.relative_to(folder)}: {link}: no such file")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].names | {"__skip"}:
                    found.append(f"{path.relative_to(folder)}: {link}: no such place")
    return found


def on_post_build(config: Any) -> None:
    dead = dead_links(Path(config["site_dir"]).resolve())
    if dead:
        raise PluginError("dead links:\n" + "\n".join(dead))
