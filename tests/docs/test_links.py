"""Links of the documents: files and headings exist, and the README stays short."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "ds_configs", "examples", "tests", "craft_ds")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)
MAX_README_LINES = 150


def without_code(text: str) -> str:
    """Return markdown without code blocks and code spans."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def links(text: str) -> Iterator[str]:
    """Yield the targets of links and images, in markdown and in HTML."""
    text = without_code(text)
    for pattern in (r"\]\(([^)\s]+)[^)]*\)", r"^\[[^\]]+\]: (\S+)", r'(?:href|src)="([^"]+)"'):
        yield from re.findall(pattern, text, re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set(re.findall(r'(?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        count = 0
        while (unique := f"{anchor}-{count}" if count else anchor) in found:
            count += 1
        found.add(unique)
    return found


def problem(document: Path, link: str) -> str | None:
    """Return what is wrong with a link of a document, or None. Links to other hosts are not checked."""
    if re.match(r"[a-z]+:", link):
        return None
    path, _, anchor = link.partition("#")
    target = document if not path else document.parent / path
    if not target.exists():
        return f"{link}: no such file"
    if not target.resolve().is_relative_to(ROOT):
        return f"{link}: outside the repository"
    if anchor and (target.suffix != ".md" or anchor not in anchors(target.read_text(encoding="utf-8"))):
        return f"{link}: no such heading"
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document):
    found = [problem(document, link) for link in links(document.read_text(encoding="utf-8"))]
    assert [line for line in found if line] == []


def test_documents_have_links():
    assert sum(1 for path in DOCUMENTS for _ in links(path.read_text(encoding="utf-8"))) > 20


def test_every_page_of_docs_is_linked():
    linked = {
        (document.parent / link.partition("#")[0]).resolve()
        for document in DOCUMENTS
        for link in links(document.read_text(encoding="utf-8"))
    }
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.resolve() not in linked] == []


@pytest.mark.parametrize("readme", sorted(ROOT.glob("README*.md")), ids=lambda path: path.name)
def test_readme_is_short(readme):
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_wrong_link_is_found():
    page = ROOT / "docs" / "engines.md"
    assert problem(page, "none.md") == "none.md: no such file"
    assert problem(page, "lora.md#none") == "lora.md#none: no such heading"
    assert problem(page, "#none") == "#none: no such heading"
    assert problem(page, "../../../") == "../../../: outside the repository"
    assert problem(page, "https://example.org/none") is None


def test_links_and_anchors_are_read():
    text = '# A `b_c`: d\n## E\n## E\n[x](y.md#z) ![p](q.png "t") `[no](no.md)`\n```\n# no\n[no](no)\n```\n'
    assert list(links(text)) == ["y.md#z", "q.png"]
    assert anchors(text) == {"a-b_c-d", "e", "e-1"}
