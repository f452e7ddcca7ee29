"""The pages are short in every direction, and whatever they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [
    path.relative_to(ROOT)
    for top in ROOT.iterdir()
    if not top.name.startswith(".")
    for path in (top.rglob("*") if top.is_dir() else [top])
]
# the ends of paths by which a page may name a file: test_ddp.py, pretrain/base_300e.sh
NAMES = {"/".join(file.parts[start:]) for file in FILES for start in range(len(file.parts))}
NAMED_FILE = re.compile(r"(?<![\w./:*-])((?:[\w-]+/)*[\w-]+\.(?:py|sh|md|toml))\b")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request):
    return request.param


def test_lines_and_cells_are_short(page):
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 100] == []
    cells = [cell.strip() for line in lines if line.startswith("|") for cell in re.split(r"(?<!\\)\|", line)]
    assert [cell for cell in cells if len(cell) > 80] == []


def test_percent_signs_follow_their_numbers(page):
    assert re.findall(r".*\d %.*", page.read_text()) == []


def test_user_pages_fit_on_a_screen(page):
    if page.parent == ROOT / "docs":
        assert len(page.read_text().splitlines()) <= 110


def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, link


def test_named_files_exist(page):
    assert {name for name in NAMED_FILE.findall(page.read_text()) if name not in NAMES} == set()


def test_every_page_can_be_reached():
    linked = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s#]+)", page.read_text())
        if not link.startswith("https://")
    }
    assert set(PAGES[1:]) - linked == set()
