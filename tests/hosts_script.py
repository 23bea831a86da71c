"""A process that knows one host alone: ``python tests/hosts_script.py HOST FOLDER``; started by `test_hosts_run`."""

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any


def main(name: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    host: Any = importlib.import_module(name)
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_light as ll

    torch.set_num_threads(1)

    class Lit(host.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Conv2d(3, 12, 3),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 10, 3),
                nn.Flatten(),
                nn.Linear(160, 5),
            )

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(images, torch.arange(16) % 5), batch_size=4)

    def fit(place: Path, resume: Path | None = None) -> Any:
        callbacks = [
            ll.StructuredPruning(
                ll.MACs(0.5), schedule=ll.Window(ll.schedules.Linear(), start=0.1, end=0.75), every_n_steps=3
            ),
            ll.MobileExport(place / "net.ptl", latency_runs=2),
            ll.CompressionMonitor(every_n_steps=1, table=False),
            host.callbacks.ModelCheckpoint(place, "{epoch}", save_top_k=-1),
        ]
        module = Lit()
        run = host.Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=callbacks,
            logger=host.loggers.CSVLogger(place),
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        run.fit(module, data, data, ckpt_path=resume)
        return module, run

    whole, first = fit(folder / "whole")
    again, second = fit(folder / "again", folder / "whole" / "epoch=1.ckpt")
    assert whole.net[0].out_channels < 12
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    states = [run.optimizers[0].state_dict()["state"] for run in (first, second)]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])
    loaded = ll.load_from_checkpoint(Lit, folder / "whole" / "epoch=2.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), loaded.parameters(), strict=True))
    assert (folder / "again" / "net.ptl").exists()
    if name == "lightning.pytorch":  # the other way round `lightning` is loaded as well, where it is installed
        assert "pytorch_lightning" not in sys.modules, "a host was imported behind the user's back"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
