"""torch.hub.load in a fresh process, beside a user's own modules; the page "Use it from
Python", word for word.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from many_processes import end, start
from refusals import user_reads
from source_files import ROOT, library_files, module_name
from tiny_classifier import classifier
from tiny_runs import checkpoint, photos, student, tokenizer

import hubconf
from checkpoint_io.published import ENTRIES


def reachable(name: str) -> set[str]:
    """Our modules that importing this one imports."""
    sources = {module_name(path): path.read_text() for path in library_files()}
    found, to_do = {name}, [name]
    while to_do:
        for node in ast.walk(ast.parse(sources[to_do.pop()])):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            new = (set(names) & sources.keys()) - found
            found |= new
            to_do += new
    return found


def test_networks_need_no_module_of_a_common_name():
    assert {"datasets", "utils"}.isdisjoint(reachable("hubconf"))


def test_every_published_name_is_an_entry():
    assert [name for name in ENTRIES if not callable(getattr(hubconf, name, None))] == []
    opened = [getattr(hubconf, name).__doc__ for name in ENTRIES]
    assert all(name in text for name, text in zip(ENTRIES, opened, strict=True))
    assert {entry.kind for entry in ENTRIES.values()} == set(hubconf.OPENED_BY)


def test_networks_of_a_size(tmp_path):
    model = hubconf.beitv2_base_patch16_224(depth=2, img_size=32, num_classes=5)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    classifier(3, tmp_path / "c.pth")
    with user_reads("is 128 wide and 6 deep, beit_base_patch16_224 is 768 and 12"):
        hubconf.beit_base_patch16_224(str(tmp_path / "c.pth"))
    with user_reads("holds no classifier: open it as a backbone"):
        hubconf.classifier(str(student(tmp_path / "pt.pth")))
    with user_reads("for random ones name a size"):
        hubconf.beitv2_base_patch16_224_pt1k(pretrained=False)


def test_a_copy_of_a_published_file(tmp_path):
    expected = classifier(1000, tmp_path / "c.pth")
    model = hubconf.beit_base_patch16_224_pt22k_ft22kto1k(weights=str(tmp_path / "c.pth"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (model(images) - expected(images)).abs().max() < 1e-6
    assert model.preprocessing.mean == (0.5, 0.5, 0.5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A user's folder: modules of common names, a photo, and the files of three runs."""
    (tmp_path / "utils.py").write_text("MINE = 'utils'\n")
    (tmp_path / "datasets.py").write_text("MINE = 'datasets'\n")
    photo = photos(tmp_path / "photos", per_class=1) / "a/0.jpg"
    photo.rename(tmp_path / "photo.jpg")
    student(tmp_path / "pt.pth")
    tokenizer(tmp_path / "vqkd.pth")
    classifier(2, tmp_path / "ft.pth")
    torch.save(checkpoint(tmp_path / "ft.pth") | {"stage": {"classes": ["x", "y"]}}, tmp_path / "ft.pth")
    for name in ("pt", "ft", "vqkd"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / f"{name}.pth").rename(tmp_path / "out" / name / "checkpoint.pth")
    return tmp_path


def in_user_folder(folder: Path, script: str) -> str:
    (folder / "script.py").write_text(f"import os\n\nos.chdir({str(folder)!r})\n{script}")
    status, said = end(start([sys.executable, str(folder / "script.py")], PYTHONPATH=""))
    assert status == 0, said[-3000:]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("imported_first", [True, False])
def test_a_users_own_utils_and_datasets_stay_theirs(imported_first, user_folder):
    theirs = "import utils, datasets\nassert (utils.MINE, datasets.MINE) == ('utils', 'datasets')\n"
    script = f"""
import torch
for entry, file in (("backbone", "pt"), ("classifier", "ft"), ("tokenizer", "vqkd")):
    network = torch.hub.load({str(ROOT)!r}, entry, f"out/{{file}}/checkpoint.pth", source="local")
    assert not network.training
    print(entry, sum(p.numel() for p in network.parameters()))
"""
    said = in_user_folder(user_folder, theirs + script + theirs if imported_first else script + theirs)
    assert [line.split()[0] for line in said.splitlines()[-3:]] == ["backbone", "classifier", "tokenizer"]


@pytest.mark.slow
def test_the_page_runs_word_for_word(user_folder):
    page = (ROOT / "docs/python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()
    ]
    typed = [line.replace("python ", f"{sys.executable} {ROOT}/").split() for line in commands]
    exported = "import subprocess\n" + "".join(f"subprocess.run({words}, check=True)\n" for words in typed)
    script = "\n".join([*blocks[:-1], exported, blocks[-1]]).replace("/path/to/this/repository", str(ROOT))
    script += """
assert features.shape == (1, 128) and patches.shape == (1, 4, 128) and attention.shape == (4, 4)
assert codes.shape == (1, 4) and len(layers) == 6
assert (torch.from_numpy(logits) - classifier(images)).abs().max() < 1e-4
assert (model(images) - classifier(images)).abs().max() < 1e-4
"""
    in_user_folder(user_folder, script)
