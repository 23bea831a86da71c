import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_light.errors import ManifestError
from lightning_light.report import report_from_checkpoint
from tests.surgery.runs import Events, Lit, Loader, trainer


def test_a_checkpoint_without_a_monitor_gives_parameters_channels_and_sparsity(tmp_path: Path) -> None:
    module = Lit()
    dense = sum(parameter.numel() for parameter in module.parameters())
    run = trainer(Events(cuts=(2,)), max_epochs=1)
    run.fit(module, Loader())
    with torch.no_grad():
        module.net.fc.weight[:2] = 0
    run.save_checkpoint(tmp_path / "last.ckpt")
    found = report_from_checkpoint(tmp_path / "last.ckpt")
    assert (found.before.params, found.after.params) == (dense, sum(p.numel() for p in module.parameters()))
    assert (found.before.macs, found.after.macs) == (None, None)
    rows = {row.name: row for row in found.after.rows}
    assert rows["net.conv1"].channels_out == module.net.conv1.out_channels == 4
    assert rows["net.fc"].sparsity == pytest.approx(2 / 5)
    assert [event["summary"] for event in found.events] == ["half of conv1 is gone"]
    assert "net.conv1     8 → 4" in str(found.layer_table())


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"found no 'state_dict' among \['bias', 'weight'\]"):
        report_from_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(ManifestError, match="version"):
        report_from_checkpoint({"state_dict": {}, "lightning_light": {"version": 99}})


def test_reports_do_not_import_lightning() -> None:
    code = (
        "import sys; from lightning_light.report import RunReport, render_report, report_from_checkpoint; "
        "assert not {'lightning', 'lightning.pytorch', 'pytorch_lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
