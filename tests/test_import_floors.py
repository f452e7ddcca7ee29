"""Imports go strictly downward (docs/design.md): no upward or sideways import, no cycle, no module outside the table."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

FLOORS = {
    6: "run_vqkd_training run_beitv2_pretraining run_class_finetuning run_linear_eval run_segmentation_finetuning "
    "encode_images visualize_attention visualize_codebook visualize_reconstruction export_checkpoint benchmark",
    5: "engine_for_vqkd engine_for_pretraining engine_for_finetuning engine_for_linear_eval engine_for_segmentation "
    "engine_for_pixel_decoder trained_segmenter benchmark_plain benchmark_steps",
    4: "engine modeling_pixel_decoder pretrained trained_classifier viewing",
    3: "run_state sliding_window segmentation_data modeling_vqkd datasets pretraining_targets weight_source code_files "
    "benchmark_peers benchmark_images",
    2: "modeling_pretrain modeling_finetune modeling_segmentation modeling_dvae vqkd_teachers norm_ema_quantizer "
    "checkpointing resumption metrics confusion samplers interruption knn transforms image_lists segmentation_views",
    1: "vit_backbone augmentation masking_generator optim_factory model_zoo distributed arguments visualization utils "
    "imagenet_classes weight_formats weight_files run_lock pages transfer shards compilation "
    "benchmark_turns benchmark_worker sharding segmentation_masks",
    0: "errors positions bf16_on_cpu image_formats torch_files",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def violations(sources: dict[str, str]) -> list[str]:
    found = [f"{name} is not in the table of floors" for name in sources if name not in FLOOR_OF]
    for name, text in sources.items():
        for other in imported(ast.parse(text)) & FLOOR_OF.keys():
            if name in FLOOR_OF and FLOOR_OF[other] >= FLOOR_OF[name]:
                found.append(f"{name} (floor {FLOOR_OF[name]}) imports {other} (floor {FLOOR_OF[other]})")
    return found


def test_imports_go_downward():
    sources = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    assert len(sources) > 20
    assert violations(sources) == []


def test_the_check_can_fail():
    assert violations({"utils": "import engine"})
    assert violations({"metrics": "def f():\n    from samplers import Key"})
    assert violations({"newcomer": ""})
    assert not violations({"metrics": "import distributed"})
