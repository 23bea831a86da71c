"""Two processes train and export; each writes its results. ``python ddp_run.py FOLDER {works,fails}``."""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_light.errors import LightningLightError
from lightning_light.export import MobileExport, Tolerance
from tests.export.nets import Images, Lit, batches, lightning


class Measured(Lit):
    """Has a metric, which the first process computes for the file."""

    def __init__(self, net: Images) -> None:
        super().__init__(net)
        self.accuracy = MulticlassAccuracy(5)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.accuracy(self.output(batch), batch["label"])
        self.log("accuracy", self.accuracy, sync_dist=True)


def main(folder: Path, way: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tolerance = Tolerance() if way == "works" else Tolerance(absolute=0.0, relative=0.0)
    export = MobileExport(folder / "model.ptl", parity=tolerance, latency_runs=2)
    module = Measured(Images())
    trainer = lightning.pytorch.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[export],
    )
    data: DataLoader[object] = batches()
    failure = None
    try:
        trainer.fit(module, data, batches(sign=-1.0))
    except LightningLightError as error:
        failure = f"{type(error).__name__}: {error}"
    seen = {
        "failure": failure,
        "report": export.report is not None,
        "batches": export.report.parity_batches if export.report else None,
        "metrics": list(export.report.evaluation.metrics) if export.report and export.report.evaluation else None,
        "hooks": sum(len(part._forward_pre_hooks) for part in module.modules()),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
