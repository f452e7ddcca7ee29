"""Imports go from a layer to the layers below it (docs/design.md), no two modules
import each other, names of tests are short, and modules too, except for a reason.
"""

import ast

from source_files import FOLDERS, ROOT, all_files, library_files, module_name

# from top to bottom: names of folders and of modules at the root; `*` stands for the
# end of a name
LAYERS = (
    (
        "commands",
        "run_vqkd_training run_beitv2_pretraining run_class_finetuning run_segmentation_finetuning "
        "run_linear_eval encode_images extract_features visualize_* export_checkpoint model_zoo benchmark "
        "advise estimate compare_runs hubconf",
    ),
    ("estimation", "estimation"),
    ("flags", "flags"),
    ("advice", "advice"),
    ("benchmarks", "benchmarks"),
    ("engines", "engine* run_state run_checkpoints"),
    ("segmentation", "segmentation"),
    ("evaluation", "evaluation visualization monitoring"),
    ("networks", "vit_backbone modeling_* norm_ema_quantizer vqkd_teachers pretrained initialization"),
    ("weights", "checkpoint_io"),
    ("images", "datasets transforms masking_generator"),
    ("data", "data_pipeline"),
    ("runtime", "runtime"),
    ("layers", "layers"),
    ("shared", "openmp_spin arguments config_files optim_factory schedules errors"),
)


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    for number, (_, names) in enumerate(LAYERS):
        if any(top.startswith(name[:-1]) if name.endswith("*") else top == name for name in names.split()):
            return number
    raise AssertionError(f"{module} is in no layer")


def imported(text: str) -> set[str]:
    """Modules that this source imports, as `layers.rel_pos_bias` whichever way it is
    written.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def violations(sources: dict[str, str]) -> list[str]:
    imports = {name: (imported(text) & sources.keys()) - {name} for name, text in sources.items()}
    upward = [f"{a} imports {b}" for a in imports for b in imports[a] if layer_of(b) < layer_of(a)]
    done: set[str] = set()
    while ready := {name for name in imports.keys() - done if imports[name] <= done}:
        done |= ready
    return upward + [f"{name} is in or above a cycle" for name in imports.keys() - done]


def test_imports_go_downward_and_not_in_circles():
    assert violations({module_name(path): path.read_text() for path in library_files()}) == []


def test_folders_are_layers_of_their_own():
    assert {folder.name for folder in FOLDERS} <= {name for _, names in LAYERS for name in names.split()}


def test_the_check_can_fail():
    assert violations({"errors": "import engine", "engine": ""})
    assert violations({"layers.a": "from runtime import b", "runtime.b": ""})
    assert violations({"runtime.a": "from runtime.b import c", "runtime.b": "from runtime import a"})
    assert not violations(
        {"runtime.a": "from runtime.b import c", "runtime.b": "", "engine": "from runtime import a"}
    )


def test_names_of_tests_are_short():
    names = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert sorted(name for name in names if len(name) > 60) == []


def test_a_module_has_300_lines_or_says_why_not():
    for path in all_files():
        text = path.read_text()
        reason = "Above 300 lines" in (ast.get_docstring(ast.parse(text)) or "")
        assert (len(text.splitlines()) > 300) == reason, path
