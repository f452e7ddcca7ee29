"""Run by test_export_transformers.py in a process of its own: what transformers makes
of exported folders.

transformers looks for a package `datasets` and would find our module of that name, so
this file imports nothing of ours and runs in another folder. Usage: python
huggingface_side.py jobs.json, a list of {"folder", "class", "inputs", "outputs", ...}.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file


def run(job: dict) -> dict:
    architecture = getattr(transformers, job["class"])
    model, info = architecture.from_pretrained(job["folder"], output_loading_info=True)
    inputs = load_file(job["inputs"])
    mask = {"bool_masked_pos": inputs["mask"].bool()} if "mask" in inputs else {}
    with torch.no_grad():
        found = model.eval()(inputs["images"], **mask)
    outputs = {key: value.contiguous() for key, value in found.items() if isinstance(value, torch.Tensor)}
    if "picture" in job:
        for name in ("AutoImageProcessor", "BeitImageProcessor"):
            processor = getattr(transformers, name).from_pretrained(job["folder"])
            outputs[name] = processor(Image.open(job["picture"]), return_tensors="pt")[
                "pixel_values"
            ].contiguous()
    save_file(outputs, job["outputs"])
    model.save_pretrained(job["saved"])  # the names of the hub
    # those of its modules
    save_file({key: value.clone() for key, value in model.state_dict().items()}, job["modules"])
    problems = {
        key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return {**problems, "id2label": model.config.id2label, "kind": type(model).__name__}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(job) for job in jobs]))
