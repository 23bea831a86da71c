"""Run real Trainers, and read the logged values back from files."""

from __future__ import annotations

import copy
import csv
import json
import pickle
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups
from torch import Tensor, nn

from lightning_light.budgets import MACs, Sparsity
from lightning_light.errors import TargetError, UnsupportedError
from lightning_light.export import MobileExport
from lightning_light.measure import count_cost
from lightning_light.monitors import CompressionMonitor
from lightning_light.monitors.dashboard import add_histograms, read_layout
from lightning_light.quantization import Int8, IntN, QuantizationAwareTraining
from lightning_light.schedules import Linear, OneShot, Window
from lightning_light.sparsity import WeightPruning
from lightning_light.structured import StructuredPruning
from lightning_light.surgery.attachment import state_of
from tests.surgery.runs import HOSTS, MODULES, Events, Lit, Loader, same, trainer
from tests.zoo import Boring

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:html5lib's sanitizer is deprecated:DeprecationWarning",
    "ignore:Experiment logs directory .* exists and is not empty",
)


def read(logger: Any) -> EventAccumulator:
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    return events


def curve(logger: Any, tag: str) -> list[tuple[int, float]]:
    tags = read(logger).Scalars(tag if tag.startswith("compression") else f"compression/{tag}")
    return [(event.step, event.value) for event in tags]


BUDGETS = {"budget/macs", "budget/params", "budget/sparsity", "budget/weight_bits"}  # columns of every run


@pytest.fixture
def board(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="board")


# What the loggers get.


def test_curves_follow_a_cut_at_its_step_and_end_at_the_last(board: TensorBoardLogger) -> None:
    module = Lit()
    dense = count_cost(module, (torch.zeros(1, 3, 8, 8),))
    trainer(Events(cuts=(6,)), CompressionMonitor(every_n_steps=5), logger=board).fit(module, Loader())
    pruned = count_cost(module, (torch.zeros(1, 3, 8, 8),))
    assert curve(board, "macs") == list(zip((0, 5, 6, 10, 12), [dense.macs] * 2 + [pruned.macs] * 3, strict=True))
    assert [value for _, value in curve(board, "params")] == [dense.params] * 2 + [pruned.params] * 3
    assert not {"compression/sparsity", "compression/bits"} & set(read(board).Tags()["scalars"])  # they do not change
    assert curve(board, "events") == [(6, 1.0), (10, 1.0), (12, 1.0)]
    (event,) = read(board).Tensors("compression/events/text_summary")
    assert (event.step, event.tensor_proto.string_val) == (6, [b"events: half of conv1 is gone"])


def test_a_layer_has_curves_of_what_changes_and_no_others(board: TensorBoardLogger) -> None:
    module = Lit()
    trainer(Events(cuts=(6,)), CompressionMonitor(every_n_steps=5), logger=board).fit(module, Loader())
    width = module.net.conv1.out_channels
    found = curve(board, "compression_layers/channels/net.conv1")
    assert found == list(zip((0, 5, 6, 10, 12), [2 * width] * 2 + [width] * 3, strict=True))
    tags = {tag for tag in read(board).Tags()["scalars"] if tag.startswith("compression_layers")}
    kept = {"channels/net.conv1", "macs/net.conv1", "params/net.conv1", "macs/net.conv2", "params/net.conv2"}
    assert tags == {f"compression_layers/{tag}" for tag in kept}


def test_overall_curves_come_first_and_are_few(board: TensorBoardLogger) -> None:
    pruning = StructuredPruning(MACs(0.5), schedule=Window(Linear(), start=0.2, end=0.8))
    monitor = CompressionMonitor(every_n_steps=1)
    trainer(pruning, monitor, logger=board).fit(Lit(), Loader())
    tags = sorted(read(board).Tags()["scalars"])
    overall = [tag for tag in tags if tag.startswith("compression/")]
    assert tags[: len(overall)] == overall
    assert overall == [f"compression/{name}" for name in ("events", "macs", "macs_planned", "params", "size")]
    planned, reached = dict(curve(board, "macs_planned")), dict(curve(board, "macs"))
    dense = reached[0]
    assert {step: value / dense for step, value in planned.items()} == {
        step: pytest.approx(1 - 0.5 * min(max((step / 12 - 0.2) / 0.6, 0), 1)) for step in planned
    }
    assert list(planned) == list(reached)
    assert reached[12] <= planned[12] == 0.5 * dense
    assert monitor.after is not None
    assert reached[12] == monitor.after.macs


def test_bits_and_size_follow_quantization_at_its_step(board: TensorBoardLogger) -> None:
    quantization = QuantizationAwareTraining(Int8(), start=0.5, calibration_batches=2)
    run = trainer(quantization, CompressionMonitor(every_n_steps=1), logger=board)
    run.fit(module := Lit(), Loader())
    events = state_of(module).state["history"]["events"]
    (enabled,) = [event["step"] for event in events if "enabled" in event["summary"]]
    bits, size = dict(curve(board, "bits")), dict(curve(board, "size"))
    assert [step for step, value in bits.items() if value < 32] == list(range(enabled, 13))
    assert all(value == pytest.approx(8, abs=0.5) for step, value in bits.items() if step >= enabled)  # batch norm: 32
    weights = [module.net.conv1.weight, module.net.conv2.weight, module.net.fc.weight]
    saved = sum(3 * weight.numel() - 4 * len(weight) for weight in weights)
    assert size[enabled] == size[0] - saved == size[12]
    assert curve(board, "compression_layers/bits/net.fc")[:3] == [(0, 32.0), (enabled - 1, 32.0), (enabled, 8.0)]
    assert run.progress_bar_metrics == {"bits": pytest.approx(8, abs=0.5)}


def test_a_replaced_layer_is_reported_by_what_replaces_it(board: TensorBoardLogger) -> None:
    monitor = CompressionMonitor(every_n_steps=1, layers="net.fc")
    trainer(Events(factor_at=5), monitor, logger=board).fit(Lit(), Loader())
    tags = read(board).Tags()["scalars"]
    assert "compression_layers/channels/net.fc" not in tags  # it never changed while it was there
    assert [step for step, _ in curve(board, "compression_layers/channels/net.fc.0")] == [*range(5, 13)]
    assert "compression_layers/params/net.fc.1" in tags
    assert not [tag for tag in tags if "net.conv1" in tag]


def test_every_logger_gets_the_same(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")]
    trainer(Events(cuts=(2,)), CompressionMonitor(every_n_steps=4), logger=loggers).fit(Lit(), Loader())
    with open(f"{loggers[1].log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("compression/params")]
    from_csv = [(int(row["step"]), float(row["compression/params"])) for row in rows]
    assert from_csv == curve(loggers[0], "params")
    table = Path(loggers[1].log_dir, "compression.md").read_text()
    assert "| net.conv1 | 8 → 4 |" in table


def test_two_optimizers_in_manual_optimization_are_logged_at_lightnings_own_steps(board: TensorBoardLogger) -> None:
    class Two(Boring):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net.fc, self.net.stem)]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            self.log("train_loss", loss)

    trainer(CompressionMonitor(), logger=board, log_every_n_steps=2, max_epochs=2).fit(
        Two(), Boring.data(), Boring.data()
    )
    logged = [event.step for event in read(board).Scalars("train_loss")]
    assert [step for step, _ in curve(board, "params")] == [0, 2, 4, 6, 8]
    assert logged == [1, 3, 5, 7]  # Lightning logs after the step that it logs


def test_tensorboard_gets_histograms_pictures_text_and_a_layout(board: TensorBoardLogger) -> None:
    trainer(Events(cuts=(2,)), CompressionMonitor(), logger=board).fit(Lit(), Loader())
    events, tags = read(board), read(board).Tags()
    assert sorted(tags["images"]) == ["compression_layers/heat_map/channels", "compression_layers/heat_map/weights"]
    assert events.Images("compression_layers/heat_map/channels")[-1].encoded_image_string.startswith(b"\x89PNG")
    assert "compression_layers/weights/net.conv1" in tags["histograms"]
    last = events.Histograms("compression_layers/weights/net.conv1")[-1].histogram_value
    assert last.num == sum(last.bucket) == 4 * 3 * 9
    assert len(last.bucket) == len(last.bucket_limit) == 64
    (text,) = events.Tensors("compression/table/text_summary")
    assert "| net.conv1 | 8 → 4 |" in text.tensor_proto.string_val[0].decode()
    assert list(read_layout(board.log_dir)) == ["Compression"]


def test_a_histogram_of_equal_weights_has_all_of_them(board: TensorBoardLogger) -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    add_histograms(board.experiment, layer, [""], step=0)
    board.experiment.flush()
    (event,) = read(board).Histograms("compression_layers/weights/model")
    assert sum(event.histogram_value.bucket) == 6
    assert (event.histogram_value.min, event.histogram_value.max) == (0.0, 0.0)


def test_outputs_can_be_switched_off(board: TensorBoardLogger, capsys: Any) -> None:
    off = dict.fromkeys(("per_layer", "histograms", "heat_map", "layout", "hparams", "progress_bar", "table"), False)
    run = trainer(Events(cuts=(2,)), CompressionMonitor(**off), logger=board)
    run.fit(Lit(), Loader())
    tags = read(board).Tags()
    assert (tags["images"], tags["histograms"]) == ([], [])
    assert "custom_scalars__config__" not in tags["tensors"]
    assert not [tag for tag in tags["scalars"] if tag.count("/") > 1]
    assert run.progress_bar_metrics == {}
    assert "before → after" not in capsys.readouterr().out


@pytest.mark.parametrize("when", ["before the run", "in the run"])
def test_the_users_layout_stays_and_ours_is_written_once(board: TensorBoardLogger, when: str) -> None:
    theirs = {"mine": {"loss": ["Multiline", ["loss/.*"]], "band": ["Margin", ["a", "b", "c"]]}}

    class Own(Lit):
        def on_train_start(self) -> None:
            if when == "in the run":
                board.experiment.add_custom_scalars(theirs)

    if when == "before the run":
        board.experiment.add_custom_scalars(theirs)
    module = Own()
    trainer(CompressionMonitor(), logger=board, max_epochs=1).fit(module, Loader())
    layout = read_layout(board.log_dir)
    assert {title: layout[title] for title in theirs} == theirs
    assert "MACs: reached and planned" in layout["Compression"]
    assert served(board) == {"mine", "Compression"}
    again = trainer(CompressionMonitor(), logger=board, max_epochs=1)
    again.fit(module, Loader())
    if when == "before the run":
        assert len(read(board).Tensors("custom_scalars__config__")) == 2  # theirs, and ours with it
    assert read_layout(board.log_dir) == layout


def test_charts_of_the_layout_name_curves_that_exist(board: TensorBoardLogger) -> None:
    trainer(Events(cuts=(2,)), CompressionMonitor(), logger=board, max_epochs=1).fit(Lit(), Loader())
    tags = read(board).Tags()["scalars"]
    assert {"Output channels per layer", "MACs per layer"} <= set(read_layout(board.log_dir)["Compression"])
    for title, (_, patterns) in read_layout(board.log_dir)["Compression"].items():
        assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), title


# Hyper-parameters.


def served(logger: Any) -> set[str]:
    """Titles of the Custom Scalars page, as TensorBoard itself serves it."""
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin  # warns when imported

    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(logger.log_dir)
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, logger.log_dir)
    page = CustomScalarsPlugin(TBContext(data_provider=provider, multiplexer=multiplexer))
    return {category["title"] for category in json.loads(page.layout_impl(RequestContext(), ""))["category"]}


def hparams_page(logger: Any) -> set[str]:
    content = read(logger).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return set(plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams)


def test_methods_join_the_users_hyper_parameters_and_leave_the_module_alone(board: TensorBoardLogger) -> None:
    module = Lit()
    run = trainer(Events(cuts=(2,)), CompressionMonitor(), logger=board)
    run.fit(module, Loader())
    assert hparams_page(board) == {"optimizer", "by_name", "early", "methods", *BUDGETS}
    assert "methods: events" in Path(board.log_dir, "hparams.yaml").read_text()
    assert set(module.hparams) == set(module.hparams_initial) == {"optimizer", "by_name", "early"}


def test_methods_are_logged_where_the_user_logs_none(board: TensorBoardLogger) -> None:
    module = Boring()
    trainer(Events(), CompressionMonitor(), logger=board, max_epochs=1).fit(module, Boring.data(), Boring.data())
    assert "methods" in hparams_page(board)
    assert dict(module.hparams) == {}


def test_methods_join_the_hyper_parameters_of_a_datamodule(board: TensorBoardLogger) -> None:
    class Data(pl.LightningDataModule):
        def __init__(self, batch_size: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return Boring.data()

        val_dataloader = train_dataloader

    data = Data()
    trainer(Events(), CompressionMonitor(), logger=board, max_epochs=1).fit(Boring(), datamodule=data)
    assert {"batch_size", "methods"} <= hparams_page(board)
    assert set(data.hparams_initial) == {"batch_size"}


def test_a_dense_run_is_on_the_page_too(board: TensorBoardLogger) -> None:
    trainer(CompressionMonitor(), logger=board, max_epochs=1).fit(Boring(), Boring.data(), Boring.data())
    assert hparams_page(board) == {"methods", *BUDGETS}
    assert curve(board, "macs")[-1][1] == read(board).Scalars("final/macs")[0].value


def hparams_of(folder: Path) -> tuple[Any, Any]:
    """What the page of hyper-parameters gets of the runs in a folder: their names and types, and the rows by MACs."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder)), multiplexer=multiplexer)
    request, backend = RequestContext(), Context(context)
    content = backend.hparams_metadata(request, "")
    experiment = backend.experiment_from_metadata(request, "", True, content, [])
    by_macs = [{"metric": {"tag": "final/macs"}, "order": api_pb2.ORDER_ASC}]
    asked = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=range(4), slice_size=99, start_index=0, col_params=by_macs
    )
    return experiment, ListSessionGroups(request, backend, "", asked).run().session_groups


def test_runs_of_a_sweep_are_compared_by_budgets_and_final_metrics(tmp_path: Path) -> None:
    for number, remaining in enumerate((0.8, 0.5, 0.3)):
        board = TensorBoardLogger(tmp_path, name="", version=f"run{number}")
        pruning = StructuredPruning(MACs(remaining), schedule=OneShot(at=0.5))
        trainer(pruning, export := MobileExport(tmp_path / f"{number}.ptl"), CompressionMonitor(), logger=board).fit(
            Lit(), Loader()
        )
    experiment, groups = hparams_of(tmp_path)
    assert {info.name.tag for info in experiment.metric_infos} == {
        f"final/{name}" for name in ("val_loss", "params", "size", "bits", "macs", "file_size", "latency_ms")
    }
    assert {info.name: info.type for info in experiment.hparam_infos}["budget/macs"] == api_pb2.DATA_TYPE_FLOAT64
    found = {
        group.hparams["budget/macs"].number_value: {metric.name.tag: metric.value for metric in group.metric_values}
        for group in groups
    }
    assert sorted(found) == [0.3, 0.5, 0.8]
    dense = count_cost(Lit(), (torch.zeros(1, 3, 8, 8),)).macs
    assert all(0.5 * budget < metrics["final/macs"] / dense <= budget for budget, metrics in found.items())
    assert export.report is not None
    assert found[0.3]["final/file_size"] == export.report.bytes
    assert found[0.3]["final/latency_ms"] == pytest.approx(1e3 * export.report.latency.median)


class Judged(Lit):
    """Logs the mean probability of the right class as its accuracy, which differs from run to run."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_accuracy", self(batch[0]).softmax(1).gather(1, batch[1][:, None]).mean())


WITHOUT = {"budget/macs": 1.0, "budget/params": 1.0, "budget/sparsity": 0.0, "budget/weight_bits": 32.0}


def sweep() -> list[tuple[dict[str, float], list[Any]]]:
    """Hyper-parameters and methods of twenty runs, one of them dense."""
    start = OneShot(at=0.5)

    def quantized(bits: int) -> QuantizationAwareTraining:
        return QuantizationAwareTraining(IntN(bits), start=0.7, calibration_batches=2)

    runs: list[tuple[dict[str, float], list[Any]]] = [({}, [])]
    for left in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        runs.append(({"budget/macs": left}, [StructuredPruning(MACs(left), schedule=start)]))
    for amount in (0.4, 0.5, 0.6, 0.7, 0.8):
        runs.append(({"budget/sparsity": amount}, [WeightPruning(Sparsity(amount), schedule=start)]))
    for bits in (2, 3, 4, 6, 8):
        runs.append(({"budget/weight_bits": bits}, [quantized(bits)]))
    for left in (0.7, 0.4):
        both = [StructuredPruning(MACs(left), schedule=OneShot(at=0.2)), quantized(8)]
        runs.append(({"budget/macs": left, "budget/weight_bits": 8}, both))
    return runs


def train_sweep(folder: Path) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Train the runs of the sweep; return their hyper-parameters and their results."""
    found = []
    for number, (hparams, methods) in enumerate(sweep()):
        monitor = CompressionMonitor(per_layer=False, histograms=False, heat_map=False, table=False)
        board = TensorBoardLogger(folder, name="", version=f"run{number:02}")
        run = trainer(*methods, monitor, logger=board)
        run.fit(module := Judged(), Loader())
        macs = float(count_cost(module, (torch.zeros(1, 3, 8, 8),)).macs)
        found.append((WITHOUT | hparams, {"macs": macs, "val_accuracy": float(run.callback_metrics["val_accuracy"])}))
    return found


@pytest.mark.slow
def test_twenty_runs_are_compared_by_accuracy_and_macs(tmp_path: Path) -> None:
    expected = train_sweep(tmp_path)
    experiment, groups = hparams_of(tmp_path)
    assert len(expected) == len(groups) == 20
    types = {info.name: info.type for info in experiment.hparam_infos}
    assert {types[name] for name in WITHOUT} == {api_pb2.DATA_TYPE_FLOAT64}
    found = []
    for group in groups:
        metrics = {metric.name.tag: metric.value for metric in group.metric_values}
        assert metrics.keys() == {f"final/{n}" for n in ("val_accuracy", "params", "size", "bits", "macs")}
        hparams = {name: group.hparams[name].number_value for name in WITHOUT}
        found.append((hparams, {name: metrics[f"final/{name}"] for name in ("macs", "val_accuracy")}))
    macs = [metrics["macs"] for _, metrics in found]
    assert macs == sorted(macs)
    assert len(set(macs)) == 8
    assert len({metrics["val_accuracy"] for _, metrics in found}) > 15

    def in_order(runs: list[Any]) -> list[Any]:
        return sorted(runs, key=lambda run: sorted(run[0].items()))

    for (hparams, metrics), (given, results) in zip(in_order(found), in_order(expected), strict=True):
        assert hparams == pytest.approx(given)
        assert metrics == pytest.approx(results)


# The table, the progress bar, other callbacks.


def test_the_table_is_printed_at_the_end(capsys: Any) -> None:
    trainer(Events(cuts=(2,), factor_at=5), CompressionMonitor()).fit(Lit(), Loader())
    out = capsys.readouterr().out
    assert "Compression: before → after" in out
    assert re.search(r"net\.conv1 +8 → 4 ", out)
    assert "Linear → 2 Linear" in out
    assert out.count("Compression: before → after") == 1


def test_results_are_attributes_of_the_callback() -> None:
    module, monitor = Lit(), CompressionMonitor(table=False)
    dense = sum(parameter.numel() for parameter in module.parameters())
    trainer(Events(cuts=(2,)), monitor).fit(module, Loader())
    assert monitor.before is not None
    assert monitor.after is not None
    assert monitor.history is not None
    assert (monitor.before.params, monitor.history.steps) == (dense, (0, 2))
    assert monitor.after.params == sum(parameter.numel() for parameter in module.parameters()) < dense


def test_the_table_lists_exported_files_wherever_the_exporter_is_in_the_list(capsys: Any) -> None:
    class Report:
        def summary(self) -> str:
            return "model.ptl: 12.3 kB"

    class Exporter(pl.Callback):
        report: Report | None = None

        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.report = Report()

    trainer(CompressionMonitor(), Exporter(), max_epochs=1).fit(Lit(), Loader())
    assert "exported: model.ptl: 12.3 kB" in capsys.readouterr().out


def test_other_callbacks_and_the_progress_bar_see_the_totals(tmp_path: Path) -> None:
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="compression/macs_remaining", mode="min", save_top_k=1)
    run = trainer(Events(cuts=(6,)), CompressionMonitor(every_n_steps=100), best)
    run.fit(Lit(), Loader())
    assert set(run.progress_bar_metrics) == {"macs"}
    share = float(run.callback_metrics["compression/macs_remaining"])
    assert run.progress_bar_metrics["macs"] == pytest.approx(share, abs=0.005)
    assert best.best_model_score is not None
    assert best.best_model_score < 0.8
    assert run.callback_metrics["compression/bits"] == 32.0


# It only watches.


def fitted(*callbacks: Any, **options: Any) -> tuple[Lit, Any]:
    torch.manual_seed(3)
    module = Lit()
    module.net.add_module("drop", nn.Dropout(0.5))  # so that randomness is drawn
    plain = module.net.forward
    module.net.forward = lambda x: F.dropout(plain(x), 0.3, module.training)
    run = trainer(*callbacks, **options)
    run.fit(module, Loader())
    return module, run


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulation", "bf16", "clipping"],
)
def test_a_run_is_the_same_with_and_without_it_bit_for_bit(board: TensorBoardLogger, options: dict[str, Any]) -> None:
    alone, first = fitted(Events(cuts=(2, 6)), logger=False, **options)
    random_alone = torch.get_rng_state()
    watched, second = fitted(Events(cuts=(2, 6)), CompressionMonitor(every_n_steps=1), logger=board, **options)
    assert torch.equal(torch.get_rng_state(), random_alone)
    assert watched.losses == alone.losses
    assert same(watched.state_dict(), alone.state_dict())
    assert same(second.optimizers[0].state_dict(), first.optimizers[0].state_dict())
    assert watched.training == alone.training


def test_it_leaves_nothing_on_the_module() -> None:
    module = Lit()
    monitor = CompressionMonitor()
    trainer(monitor, max_epochs=1).fit(module, Loader())
    assert not module._forward_pre_hooks
    assert {name for name in vars(monitor) if name.startswith("_")} <= {
        "_key",
        "_attached",
        "_run_position",
        "_cost_counter",
        "_recorder",
        "_last_step",
        "_parameters",
        "_last_signature",
        "_patches",
        "_masks",
        "_curves",
        "_events_written",
        "_validation",
    }
    assert not any(
        vars(monitor)[name]
        for name in ("_cost_counter", "_recorder", "_parameters", "_patches", "_masks", "_validation")
    )
    assert repr(pickle.loads(pickle.dumps(monitor))) == repr(monitor)


def test_a_run_that_fails_early_leaves_hyper_parameters_and_hooks_as_they_were() -> None:
    class Failing(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise KeyError("planted")

    module = Lit()
    with pytest.raises(KeyError, match="planted"):
        trainer(Events(), CompressionMonitor(), Failing()).fit(module, Loader())
    assert set(module.hparams_initial) == {"optimizer", "by_name", "early"}
    assert not module._forward_pre_hooks


def test_two_monitors_restore_the_hyper_parameters(board: TensorBoardLogger) -> None:
    module = Lit()
    both = CompressionMonitor(), CompressionMonitor(table=False, layers="net.fc")
    trainer(Events(), *both, logger=board, max_epochs=1).fit(module, Loader())
    assert set(module.hparams_initial) == {"optimizer", "by_name", "early"}
    assert {"compression_monitor", "compression_monitor#2"} <= set(state_of(module).state)


def test_a_method_after_it_in_the_list_is_recorded(board: TensorBoardLogger) -> None:
    trainer(CompressionMonitor(every_n_steps=100), Events(cuts=(3,)), logger=board).fit(Lit(), Loader())
    assert [step for step, _ in curve(board, "params")] == [0, 3, 12]


# Resume, second fit, and runs that are not fits.


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_resumed_run_compares_with_the_dense_network(tmp_path: Path, capsys: Any, weights_only: bool) -> None:
    run = trainer(Events(cuts=(1,)), CompressionMonitor(), max_epochs=1)
    run.fit(module := Lit(), Loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    dense = state_of(module).state["compression_monitor"]["before"]
    capsys.readouterr()
    resumed = Lit()
    board = TensorBoardLogger(tmp_path, name="resumed")
    options: dict[str, Any] = {"weights_only": True} if weights_only else {}
    second = trainer(Events(cuts=(1, 5)), CompressionMonitor(every_n_steps=1), max_epochs=2, logger=board)
    second.fit(resumed, Loader(), ckpt_path=tmp_path / "last.ckpt", **options)
    assert state_of(resumed).state["compression_monitor"]["before"] == dense
    assert curve(board, "compression_layers/channels/net.conv1")[:3] == [(0, 8.0), (4, 4.0), (5, 2.0)]
    assert curve(board, "params")[0][1] < 0.8 * dense["params"]
    assert "8 → 2" in capsys.readouterr().out
    assert state_of(resumed).state["compression_monitor"]["history"]["steps"] == [0, 1, 5]


def test_resuming_at_every_step_gives_the_same_history(tmp_path: Path) -> None:
    every = pl.callbacks.ModelCheckpoint(
        tmp_path, "{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1
    )
    trainer(Events(cuts=(2, 6), factor_at=5), CompressionMonitor(), every).fit(whole := Lit(), Loader())
    for step in range(1, 12):
        resumed = Lit()
        run = trainer(Events(cuts=(2, 6), factor_at=5), CompressionMonitor())
        run.fit(resumed, Loader(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert same(state_of(resumed).state, state_of(whole).state), step


def test_a_second_fit_goes_on_comparing_with_the_first_start(capsys: Any) -> None:
    module = Lit()
    trainer(Events(cuts=(1,)), CompressionMonitor(), max_epochs=1).fit(module, Loader())
    capsys.readouterr()
    trainer(CompressionMonitor(), max_epochs=1).fit(module, Loader())
    assert re.search(r"net\.conv1 +8 → 4 ", capsys.readouterr().out)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_it_logs_nothing_outside_of_fit(stage: str, board: TensorBoardLogger, capsys: Any) -> None:
    getattr(trainer(CompressionMonitor(), logger=board), stage)(Lit(), Loader(), verbose=False)
    assert capsys.readouterr().out == ""
    assert not [tag for tag in read(board).Tags()["scalars"] if tag.startswith("compression")]


@pytest.mark.parametrize("host", HOSTS)
def test_fast_dev_run_on_both_hosts(host: Any, capsys: Any) -> None:
    trainer(CompressionMonitor(), host=host, fast_dev_run=True, logger=True).fit(MODULES[host](), Loader())
    assert "Compression: before → after" in capsys.readouterr().out


@pytest.mark.parametrize("host", HOSTS)
def test_the_other_host_has_its_tensorboard_too(host: Any, tmp_path: Path) -> None:
    logger = host.loggers.TensorBoardLogger(tmp_path)
    trainer(Events(cuts=(2,)), CompressionMonitor(), host=host, logger=logger).fit(MODULES[host](), Loader())
    tags = read(logger).Tags()
    assert "compression_layers/heat_map/channels" in tags["images"]
    assert {"compression/macs", "compression_layers/channels/net.conv1"} <= set(tags["scalars"])
    assert {"optimizer", "methods"} <= hparams_page(logger)


def test_the_learning_rate_finder_inside_fit_leaves_no_trace_in_the_history(board: TensorBoardLogger) -> None:
    class Rated(Lit):
        lr = 0.01

    finder = pl.callbacks.LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    module = Rated()
    trainer(
        finder,
        CompressionMonitor(every_n_steps=1),
        logger=board,
        enable_checkpointing=True,
        default_root_dir=board.root_dir,
    ).fit(module, Loader())
    assert [step for step, _ in curve(board, "params")][:3] == [0, 1, 2]
    assert state_of(module).state["compression_monitor"]["history"]["steps"] == [0]


# Unusual modules.


def test_lazy_layers_are_recorded_once_they_have_shapes(board: TensorBoardLogger) -> None:
    class Lazy(Boring):
        def __init__(self) -> None:
            super().__init__()
            self.net.fc = nn.LazyLinear(5)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.stem.parameters(), 0.1)

    trainer(CompressionMonitor(), logger=board, max_epochs=1).fit(Lazy(), Boring.data(), Boring.data())
    assert curve(board, "params")[0] == (0, 1885.0)


def test_layers_of_configure_model_are_recorded(board: TensorBoardLogger) -> None:
    class Late(Boring):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.Linear(2, 2)

    trainer(CompressionMonitor(), logger=board, max_epochs=1).fit(Late(), Boring.data(), Boring.data())
    assert curve(board, "params")[0] == (0, sum(parameter.numel() for parameter in Late().parameters()) + 6.0)


def test_a_module_whose_input_is_not_found_has_no_macs(board: TensorBoardLogger, capsys: Any) -> None:
    class Graded(Boring):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            logits = self.net(batch[0])
            assert logits.requires_grad  # which it does not in isolation
            return F.cross_entropy(logits, batch[1])

    run = trainer(CompressionMonitor(), logger=board, max_epochs=1)
    run.fit(Graded(), Boring.data(), Boring.data())
    assert "compression/macs" not in read(board).Tags()["scalars"]
    assert "compression/params_remaining" in run.callback_metrics
    assert run.progress_bar_metrics == {}
    assert "MACs are unknown" in capsys.readouterr().out


def test_an_example_input_that_does_not_fit_ends_the_count_and_not_the_run() -> None:
    module = Boring()
    module.example_input_array = torch.zeros(1, 7, 8, 8)
    run = trainer(CompressionMonitor(table=False), max_epochs=1)
    with pytest.warns(UserWarning, match=r"reports no MACs: `Boring.forward` does not run on the example input"):
        run.fit(module, Boring.data(), Boring.data())
    assert run.global_step == 4


def test_macs_are_per_sample(board: TensorBoardLogger) -> None:
    module = Boring()
    module.example_input_array = torch.zeros(16, 3, 8, 8)
    trainer(CompressionMonitor(), logger=board, max_epochs=1).fit(module, Boring.data(), Boring.data())
    assert curve(board, "macs")[0][1] == count_cost(module, (torch.zeros(1, 3, 8, 8),)).macs


def test_weights_that_are_not_finite_do_not_end_the_run(board: TensorBoardLogger) -> None:
    class Broken(Boring):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                with torch.no_grad():
                    self.net.stem.weight.fill_(float("nan"))
                    self.net.fc.weight[0, 0] = float("inf")

    trainer(CompressionMonitor(), logger=board, max_epochs=1).fit(Broken(), Boring.data(), Boring.data())
    assert "compression_layers/weights/net.stem" not in read(board).Tags()["histograms"]
    assert read(board).Histograms("compression_layers/weights/net.fc")[-1].histogram_value.num == 5 * 12 - 1


# Bad input.


def test_layers_that_the_model_does_not_have_are_refused_before_training() -> None:
    module = Lit()
    with pytest.raises(TargetError, match=r"net\.cnov1"):
        trainer(CompressionMonitor(layers=["net.cnov1"])).fit(module, Loader())
    assert module.losses == []


def test_a_strategy_that_shards_is_refused() -> None:
    class Sharded(pl.strategies.SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    run = trainer(CompressionMonitor(), strategy=Sharded(device="cpu"))
    with pytest.raises(UnsupportedError, match=r"`CompressionMonitor` with `Sharded`: expected a strategy that leaves"):
        run.fit(Lit(), Loader())


def test_its_repr_is_its_constructor_call() -> None:
    monitor = CompressionMonitor(every_n_steps=7, layers=["net.*"], table=False)
    assert repr(monitor) == "CompressionMonitor(every_n_steps=7, layers=['net.*'], table=False)"
    assert vars(eval(repr(monitor))) == vars(monitor)
    assert copy.deepcopy(monitor).layers == ["net.*"]


def test_the_effect_of_sparsity_is_reported(board: TensorBoardLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks are read from the compression state; two filters die at step 4, two more weights at step 8."""

    class Masks(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            mask = torch.ones_like(pl_module.net.conv1.weight, dtype=torch.bool)
            mask[:2] = trainer.global_step < 4
            mask[2, 0, 0, :2] = trainer.global_step < 8
            state_of(pl_module).state["some_method"] = {"masks": {"net.conv1.weight": mask}}
            self.mask = mask

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.net.conv1.weight.data.mul_(self.mask)

    module, masks, monitor = Lit(), Masks(), CompressionMonitor(every_n_steps=1)
    trainer(masks, monitor, logger=board).fit(module, Loader())
    layer = module.net.conv1.weight
    gone = 2 * layer[0].numel()
    total = sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)
    churn = dict(curve(board, "compression_details/churn"))
    assert {step: value for step, value in churn.items() if value} == {
        4: pytest.approx(gone / layer.numel()),
        8: pytest.approx(2 / layer.numel()),
    }
    assert curve(board, "compression_details/dead_filters")[:3] == [(0, 0.0), (3, 0.0), (4, 2.0)]
    assert monitor.after is not None
    assert monitor.before is not None
    assert (monitor.before.dead_filters, monitor.after.dead_filters) == (0, 2)
    assert monitor.after.sparsity == pytest.approx((gone + 2) / total)
    dense = count_cost(module, (torch.zeros(1, 3, 8, 8),))
    zeros = (gone + 2) / layer.numel()
    assert monitor.after.effective_macs == round(dense.macs - zeros * dense.macs_by_module["net.conv1"])
    assert curve(board, "compression_details/effective_macs")[-1][1] == monitor.after.effective_macs
    assert curve(board, "compression_details/deflated_bytes")[-1][1] == monitor.after.deflated
    printed = capsys.readouterr().out
    assert "effective MACs (nonzero weights)" in printed
    assert "size after compression (DEFLATE)" in printed
    assert "0 → 2" in printed


# Other loggers, where they are installed.


def test_wandb_gets_the_curves_and_the_table(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    logger = pl.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    trainer(Events(cuts=(2,)), CompressionMonitor(), logger=logger, max_epochs=1).fit(Lit(), Loader())
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert summary["compression_layers/channels/net.conv1"] == 4
    assert "compression/table" in summary
    assert list(tmp_path.rglob("*.table.json"))


def test_mlflow_gets_the_curves_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than `mlflow-skinny`
    files = tmp_path / "runs"
    logger = pl.loggers.MLFlowLogger(tracking_uri=files.as_uri())
    trainer(Events(cuts=(2,)), CompressionMonitor(), logger=logger, max_epochs=1).fit(Lit(), Loader())
    client = logger.experiment
    history = client.get_metric_history(logger.run_id, "compression_layers/channels/net.conv1")
    assert [(point.step, point.value) for point in history][:3] == [(0, 8.0), (1, 8.0), (2, 4.0)]
    assert "| net.conv1 | 8 → 4 |" in next(files.rglob("compression.md")).read_text()
