"""After a structural change the best checkpoint is selected again."""

import math
from typing import Any

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_light.surgery.checkpoint_monitoring import reset_monitoring
from tests.surgery.runs import HOSTS, MODULES, Events, Lit, Loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
)


class GetsWorse(Lit):
    """What it logs rises by one an epoch: the first network would win every race."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", float(self.current_epoch))


@pytest.mark.parametrize("compressed", [True, False])
def test_best_is_a_network_of_the_last_structure(compressed, tmp_path) -> None:
    host = HOSTS[0].callbacks
    best = host.ModelCheckpoint(tmp_path, "{epoch}", monitor="loss", auto_insert_metric_name=False)
    waits = host.EarlyStopping("loss", patience=2)
    run = trainer(Events(cuts=(8,) if compressed else ()), best, waits, max_epochs=4)
    run.fit(GetsWorse(), Loader())
    epochs, winner = (4, 2) if compressed else (3, 0)
    assert (run.current_epoch, best.best_model_path) == (epochs, str(tmp_path / f"{winner}.ckpt"))
    assert best.best_model_score == winner
    run.test(ckpt_path="best", verbose=False)
    assert run.lightning_module.net.conv1.out_channels == (4 if compressed else 8)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_everything_that_compares_metrics_is_reset(host, mode, tmp_path, caplog) -> None:
    class Plateau(MODULES[host]):
        def configure_optimizers(self) -> Any:
            optimizer = self.make()
            config = {"scheduler": ReduceLROnPlateau(optimizer, mode=mode), "monitor": "val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    racing = host.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", mode=mode, save_top_k=2)
    keeping = host.callbacks.ModelCheckpoint(tmp_path / "last")
    waits = host.callbacks.EarlyStopping("val_loss", mode=mode)
    run = trainer(racing, keeping, waits, host=host, max_epochs=2)
    run.fit(Plateau(), Loader())
    scheduler = run.lr_scheduler_configs[0].scheduler
    waits.wait_count, scheduler.num_bad_epochs = 2, 3
    kept = keeping.best_model_path
    assert kept
    assert racing.best_k_models
    with caplog.at_level("INFO"):
        assert reset_monitoring(run) == ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"]
    worst = math.inf if mode == "min" else -math.inf
    assert (racing.best_k_models, racing.best_model_path, racing.best_model_score) == ({}, "", None)
    assert (racing.kth_best_model_path, racing.kth_value.item()) == ("", worst)
    assert (waits.wait_count, waits.best_score.item()) == (0, worst)
    assert (scheduler.num_bad_epochs, scheduler.best) == (0, worst)
    assert keeping.best_model_path == kept
    assert any("the best values of" in record.message for record in caplog.records)
    run.fit_loop.max_epochs = 3
    run.fit(run.lightning_module, Loader())
    assert len(racing.best_k_models) == 1


def test_nothing_is_logged_where_nothing_is_reset(caplog) -> None:
    with caplog.at_level("INFO"):
        assert reset_monitoring(trainer()) == []
    assert not any("the best values of" in record.message for record in caplog.records)
