"""The project's own Python files, for tests that read the code."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))


def library_files() -> list[Path]:
    """The modules at the root and in the folders beside them, without tests and
    scripts.
    """
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in folder.glob("*.py"))]
    return sorted(path for path in files if path.name != "__init__.py")


def all_files() -> list[Path]:
    return [*library_files(), *sorted((ROOT / "scripts").glob("**/*.py"))]


def module_name(path: Path) -> str:
    """As it is imported: `engine`, `layers.rel_pos_bias`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def load_script(name: str) -> ModuleType:
    """scripts/`name`.py, again each time; it is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
