"""The one link checker: of notebooks, Markdown files and pages alike."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup

from fedkd_utils.notebooks import read


def slug(heading: str) -> str:
    """What GitHub makes of a heading, after github-slugger: small letters, no punctuation, hyphens for spaces."""
    return "".join("-" if c == " " else c for c in heading.lower() if c.isalnum() or c in " -_")


def links_and_anchors(path: Path) -> tuple[list[str], set[str]]:
    """The targets of all links in a file, pictures, styles and scripts among them, and the anchors that it has."""
    if path.suffix == ".html":
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        targets = [tag.get("href") or tag.get("src") for tag in soup.find_all(["a", "link", "script", "img"])]
        return [str(target) for target in targets if target], {str(tag["id"]) for tag in soup.find_all(id=True)}
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    prose = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.S | re.M)
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+?) *$", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose), re.M):
        name, number = slug(heading), 0
        while (anchor := f"{name}-{number}" if number else name) in anchors:
            number += 1
        anchors.add(anchor)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'(][^)]*)?\)", prose)
    named = re.findall(r"^ {0,3}\[[^\]^][^\]]*\]:\s*<?([^\s>]+)", prose, re.M)
    markup = re.findall(r"<(?:a|img)\b[^>]*?\b(?:href|src)\s*=\s*[\"']?([^\"'\s>]+)", prose, re.I)
    return [*inline, *named, *markup], anchors


def broken_links(path: Path) -> list[str]:
    """The targets in a file that lead to no file or no heading of this project; addresses outside are not asked."""
    found = []
    targets, own = links_and_anchors(path)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = path.parent / unquote(file)
        if not other.exists():
            found.append(target)
        elif anchor and unquote(anchor) not in (links_and_anchors(other)[1] if file else own):
            found.append(target)
    return found
