"""TensorBoard's files: training and test are two writers with the same names, so that
both are on one chart.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from monitoring.tracked_run import TrackedRun

CURVES = ("train", "test", "test_ema")  # a folder for each, the name of its curves
OF_OPTIMIZER = ("lr", "grad_norm", "loss_scale", "skipped")


class TensorBoard:
    """Files in `log_dir` or output_dir: flags, command and pictures there, curves in
    the folders `train`, `test` and `test_ema`. What an earlier part of the run wrote
    after the step where it goes on, or an earlier run, is taken back.
    """

    def __init__(self, run: TrackedRun) -> None:
        self.folder = Path(run.log_dir or run.output_dir)
        self.purge_step = run.first_step + 1 if run.first_step else 0
        self.writers: dict[str, SummaryWriter] = {}
        self.main = self.writer("")
        config = run.config()
        command = str(config.pop("command")).replace(" --", " \\\n        --")
        self.main.add_text("command", f"    {command}", run.first_step)
        rows = "".join(f"| {name} | {value} |\n" for name, value in sorted(config.items()))
        self.main.add_text("flags", f"| flag | value |\n| --- | --- |\n{rows}", run.first_step)
        # as texts, or False would be 0.000
        chosen = {
            name: str(v) if isinstance(v, bool) else v for name, v in config.items() if name in run.chosen
        }
        _, started, self.finished = hparams(chosen, {})
        self.main._get_file_writer().add_summary(started)

    def writer(self, curve: str) -> SummaryWriter:
        if curve not in self.writers:
            self.writers[curve] = SummaryWriter(str(self.folder / curve), purge_step=self.purge_step)
        return self.writers[curve]

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            curve, _, quantity = name.partition("/")
            if curve in CURVES:
                section = "optimizer" if quantity in OF_OPTIMIZER else "learning"
                self.writer(curve).add_scalar(f"{section}/{quantity}", value, step)
            else:
                self.writer("train").add_scalar(name, value, step)

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        for name, image in images.items():
            self.main.add_image(f"pictures/{name}", image, step)

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    def close(self, status: str) -> None:
        if status == "finished":
            self.main._get_file_writer().add_summary(self.finished)
        for writer in self.writers.values():
            writer.close()
