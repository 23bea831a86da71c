"""Branches are merged in what is exported, not in the live module; and not in a quantized network."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_light.errors import ParityError
from lightning_light.export import MobileExport, export_model
from lightning_light.merging import merging_method
from lightning_light.quantization import Int8, QuantizationAwareTraining
from lightning_light.reparameterization import ACB, Branches, Reparameterization
from lightning_light.reparameterization.apply import branched_layers
from tests.contract.bodies import Body, module_class
from tests.contract.runs import DEFAULT_HOST, trainer
from tests.test_merging import Blend, Deployable, network


@pytest.mark.parametrize("merge", [True, False])
def test_blocks_that_merge_themselves_are_exported_merged(merge: bool, tmp_path: Path) -> None:
    model, x = network()
    before = model(x)
    report = export_model(model, x, tmp_path / "m.ptl", latency_runs=2, merge_branches=merge)
    blocks = {"stem": "fuse", "stages.0": "switch_to_deploy", "stages.1": "reparameterize", "stages.2": "fuse_convs"}
    assert report.details["merged_branches"] == (blocks if merge else {})
    assert report.parity.max_absolute < 1e-4
    assert json.loads((tmp_path / "m.ptl.json").read_text())["details"]["merged_branches"] == (blocks if merge else {})
    assert torch.equal(model(x), before)
    assert [name for name, part in model.named_modules() if merging_method(part)]


def test_merged_files_are_smaller_and_count_the_merged_network(tmp_path: Path) -> None:
    model, x = network()
    reports = [
        export_model(model, x, tmp_path / f"{merge}.ptl", latency_runs=2, merge_branches=merge)
        for merge in (True, False)
    ]
    assert reports[0].macs < reports[1].macs
    assert reports[0].params < reports[1].params
    assert reports[0].bytes < reports[1].bytes


def test_a_method_that_changes_the_function_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model, x = nn.Sequential(Blend(), nn.ReLU()).eval(), torch.randn(2, 3, 4, 4)
    with pytest.raises(ParityError, match=r"export of Sequential.*`merge_branches=False`"):
        export_model(model, x, tmp_path / "m.ptl")
    assert not list(tmp_path.iterdir())
    export_model(model, x, tmp_path / "m.ptl", latency_runs=2, merge_branches=False)


@pytest.mark.parametrize("form", [ACB(), Branches(3)], ids=repr)
def test_the_branches_of_a_run_are_exported_merged_and_stay_in_the_module(form: object, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module, export = module_class(Body, DEFAULT_HOST)(), MobileExport(tmp_path / "m.ptl", latency_runs=2)
    trainer(Reparameterization(form), export).fit(module)  # type: ignore[arg-type]
    assert len(branched_layers(module)) == 4
    assert export.report is not None
    assert set(export.report.details["merged_branches"]) == set(branched_layers(module))
    plain = MobileExport(tmp_path / "plain.ptl", latency_runs=2)
    trainer(plain).fit(module_class(Body, DEFAULT_HOST)())
    assert plain.report is not None
    assert export.report.macs == plain.report.macs


class WithBlock(Body):
    """One of its layers is a block of branches."""

    def make(self) -> None:
        super().make()
        self.features.conv1 = Deployable(8, 16)


def test_a_quantized_network_keeps_its_blocks(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module, export = module_class(WithBlock, DEFAULT_HOST)(), MobileExport(tmp_path / "m.ptl", latency_runs=2)
    trainer(QuantizationAwareTraining(Int8(), start=0.2, calibration_batches=2), export).fit(module)
    assert export.report is not None
    assert export.report.details["merged_branches"] == {}
    assert "output_scales" in export.report.details
