"""Links between pages, and what they name in the repository, are there."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.ipynb")]
FOLDERS = "configs|docs|examples|sasa_det|tests|tools"


def text_of(page):
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return text


def prose(page):
    """The text of a page without blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names_of_files(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_relative_to(ROOT) and file.exists(), link
        assert not anchor or anchor in anchors(file), link
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", prose(page)):
        assert (ROOT / name).exists() or (ROOT / "sasa_det" / name).exists(), name


def test_every_page_is_in_the_site():
    listed = re.findall(
        r"```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)```", text_of(ROOT / "docs/index.md"), re.S
    )
    names = " ".join(listed).split()
    assert sorted([*names, "index"]) == sorted(page.stem for page in ROOT.glob("docs/*.md"))
