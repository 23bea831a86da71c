from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_light.formatting import human_bytes, human_count
from lightning_light.measure import LayerRow, count_cost
from lightning_light.measure.comparison import compression_table
from lightning_light.measure.layer_matching import match_layers, remaining
from lightning_light.measure.snapshot import Snapshot, matrix_layers, structure, take_snapshot
from tests.zoo import ZOO, Net


def net(first: int = 16, second: int = 24) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, first, 3),
        nn.BatchNorm2d(first),
        nn.Conv2d(first, second, 3),
        nn.Flatten(),
        nn.Linear(16 * second, 5),
    )


def snapshot(model: nn.Module) -> Snapshot:
    return take_snapshot(model, count_cost(model, (torch.zeros(1, 3, 8, 8),)))


def text(before: Snapshot, after: Snapshot, width: int = 120, **options: object) -> str:
    return compression_table(before, after, **options).text(width)


def row(name: str, *, kind: str = "Linear", out: int | None = 4, params: int = 8, sparsity: float = 0.0) -> LayerRow:
    return LayerRow(name, kind, 2, out, params, 8, sparsity, 32.0)


@pytest.mark.parametrize("make", ZOO.values(), ids=ZOO)
def test_a_snapshot_adds_up_and_changes_nothing(make: Callable[[], Net]) -> None:
    model = make().train()
    args, kwargs = model.example
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    found = take_snapshot(model, count_cost(model, args, kwargs))
    assert sum(line.params for line in found.rows) == found.params == sum(p.numel() for p in model.parameters())
    assert sum(line.macs for line in found.rows) == found.macs
    assert (found.bits, found.deflated) == (32.0, None)
    assert Snapshot.from_plain(found.plain()) == found
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_only_the_macs_need_a_forward_pass() -> None:
    model = net()
    blind, full = take_snapshot(model), snapshot(model)
    assert blind.macs is None
    assert (blind.params, blind.bytes, blind.sparsity) == (full.params, full.bytes, full.sparsity)
    assert "MACs" not in text(blind, blind)


def test_sparsity_is_that_of_parametrized_weights() -> None:
    model = nn.Sequential(nn.Linear(10, 10))
    parametrizations.spectral_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original[:5] = 0.0
    vectors = model[0].parametrizations.weight[0]._u.clone()
    found = take_snapshot(model.train())
    assert found.sparsity == pytest.approx(0.5)
    assert [(line.name, line.type, line.params) for line in found.rows] == [("0", "Linear", 110)]
    assert torch.equal(model[0].parametrizations.weight[0]._u, vectors)  # reading a weight in training would move it on


def test_weights_shared_by_two_layers_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.zero_()
    assert take_snapshot(model).sparsity == pytest.approx(0.5)


def test_structure_changes_with_shapes_classes_and_formats_only() -> None:
    model = net()
    first = structure(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert structure(model) == first
    assert structure(net(first=15)) != first
    assert structure(net().half()) != first
    model[1] = nn.Identity()
    assert structure(model) != first


def test_matrix_layers_have_a_weight_of_two_dimensions() -> None:
    assert matrix_layers(net()) == ["0", "2", "4"]
    assert matrix_layers(ZOO["weight_norm"]()) == matrix_layers(ZOO["plain"]())


@pytest.mark.parametrize(
    ("before", "after", "pairs"),
    [
        (["a", "b"], ["a", "b"], [("a", 1, 1), ("b", 1, 1)]),
        (["a"], ["a.0", "a.1"], [("a", 1, 2)]),
        (["a.conv3", "a.conv1", "b"], ["a", "b"], [("a", 2, 1), ("b", 1, 1)]),
        (["a", "a.out"], ["a", "a.out"], [("a", 1, 1), ("a.out", 1, 1)]),
        (["a", "gone"], ["a", "new"], [("a", 1, 1), ("gone", 1, 0), ("new", 0, 1)]),
        (["layer1"], ["layer10"], [("layer1", 1, 0), ("layer10", 0, 1)]),
    ],
)
def test_rows_are_paired_by_name(before: list[str], after: list[str], pairs: list[tuple[str, int, int]]) -> None:
    found = match_layers([row(name) for name in before], [row(name) for name in after])
    assert [(pair.name, len(pair.before), len(pair.after)) for pair in found] == pairs


def test_remaining_counts_output_channels_and_nonzero_weights() -> None:
    (pair,) = match_layers([row("a", out=8, params=100)], [row("a.0", out=2, params=20), row("a.1", out=6, params=40)])
    assert remaining(pair) == (6 / 8, 60 / 100)
    (pair,) = match_layers([row("a", params=100)], [row("a", params=100, sparsity=0.9)])
    assert remaining(pair) == (1.0, pytest.approx(0.1))
    (pair,) = match_layers([row("a")], [])
    assert remaining(pair) == (0.0, 0.0)
    (pair,) = match_layers([], [row("a")])
    assert remaining(pair) == (1.0, 1.0)


def test_the_table_lists_every_layer_before_and_after() -> None:
    before, after = snapshot(net()), snapshot(net(first=6, second=9))
    shown = text(before, after)
    assert "16 → 6" in shown
    assert "448 → 168" in shown  # 16 * (27 + 1) and 6 * (27 + 1)
    assert f"{human_count(before.macs or 0)} → {human_count(after.macs or 0)}" in shown
    assert f"{human_bytes(before.bytes)} → {human_bytes(after.bytes)}" in shown
    assert f"{after.params / before.params:.1%}" in shown
    assert "sparsity: 0%, unchanged" in shown
    assert "bits per weight: 32, unchanged" in shown


def test_columns_of_sparsity_bits_and_types_appear_when_they_change() -> None:
    before = snapshot(model := net())
    prune.l1_unstructured(model[2], "weight", 0.9)
    prune.remove(model[2], "weight")
    model[4] = nn.Sequential(nn.Linear(16 * 24, 2, bias=False), nn.Linear(2, 5)).to(torch.bfloat16)
    shown = text(before, take_snapshot(model))
    assert "0% → 90.0%" in shown
    assert "32 → 16" in shown
    assert "Linear → 2 Linear" in shown
    assert "Conv2d" not in shown  # nothing has become of its type


def test_a_fake_quantized_layer_counts_as_int8_is_stored() -> None:
    model = net()
    stats = {"0": {"weight_bits": 8.0, "activation_bits": 8.0}, "4": {"weight_bits": 4.0}}
    plain, found = snapshot(model), take_snapshot(model, count_cost(model, (torch.zeros(1, 3, 8, 8),)), stats)
    weights = [model[0].weight, model[2].weight, model[4].weight]
    elements = [weight.numel() for weight in weights]
    batch_norm = model[1].weight.numel()
    assert found.bits == pytest.approx(
        (8 * elements[0] + 32 * (elements[1] + batch_norm) + 4 * elements[2]) / (sum(elements) + batch_norm)
    )
    assert plain.bytes - found.bytes == 3 * (elements[0] + elements[2]) - 4 * (16 + 5)  # and a scale per channel
    assert [line.bits for line in found.rows] == [8.0, 32.0, 32.0, 4.0]
    assert found.rows[0].bytes == elements[0] + 4 * 16 + 4 * 16  # int8 weights, float scales, float biases
    macs = {line.name: line.macs for line in found.rows}
    assert found.bops == macs["0"] * 64 + macs["2"] * 32 * 32 + macs["4"] * 4 * 32
    assert plain.bops == 1024 * (plain.macs or 0)


def test_layers_without_a_line_share_one() -> None:
    before, after = snapshot(net()), snapshot(net(first=6))
    shown = text(before, after, layers=["0", "4"])
    assert "(2 others)" in shown
    listed = sum(line.params for line in before.rows if line.name not in ("0", "4"))
    assert f"{human_count(listed)} → " in shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_has_whole_words_and_names_what_is_left_out(width: int) -> None:
    class Deep(nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.encoder = nn.ModuleDict({"self_attention": net(first), "a_name_of_thirty_characters_or": net(first)})
            self.head = nn.Linear(2, 2)

    model = Deep(6)
    model.encoder["self_attention"][2].weight.data[:4] = 0
    before, after = take_snapshot(Deep(16)), take_snapshot(model, stats={"head": {"rank": 1.0, "energy_kept": 0.5}})
    table = compression_table(before, after)
    lines, whole = table.text(width).splitlines(), table.text()
    assert max(map(len, lines)) <= width
    words = {word.strip(",─") for line in lines for word in line.split() if "…" not in word}
    known = {word.strip(",─") for word in whole.split()}
    assert words <= known | {"too", "wide", "for", str(width), "columns:"}
    (header,) = [line for line in lines if line.split()[:1] == ["layer"]]
    left_out = [name for name in table.headers if name not in header]
    if left_out:
        note = " ".join(" ".join(lines).partition("columns: ")[2].split())
        assert sorted(note.split(", ")) == sorted(left_out)
    assert "size" in header
    assert any(line.split()[:1] == ["head"] for line in lines)


def test_a_table_in_a_notebook_is_html_with_escaped_cells() -> None:
    model = nn.Sequential()
    model.add_module("a<b", nn.Linear(2, 2))
    shown = compression_table(take_snapshot(model), take_snapshot(model))._repr_html_()
    assert '<td style="text-align: left">a&lt;b</td>' in shown
    assert shown.count("<tr>") == 1 + 1 + 2
    assert '<th style="text-align: right">params</th>' in shown


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    model = nn.Sequential()
    model.add_module("[red]", nn.Linear(2, 2))
    assert "[red]" in text(take_snapshot(model), take_snapshot(model))


def test_markdown_has_the_same_lines() -> None:
    before, after = snapshot(net()), snapshot(net(first=6))
    lines = compression_table(before, after, notes=["exported: model.ptl"]).markdown().splitlines()
    assert lines[0] == "| layer | channels | params | MACs | size |"
    assert lines[2].startswith("| 0 | 16 → 6 | 448 → 168 |")
    assert lines[-1].startswith("exported: model.ptl")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (999, "999"), (999.6, "1k"), (12_345, "12.3k"), (999_600, "1M"), (4.1e9, "4.1G"), (2e13, "20T")],
)
def test_counts_have_three_digits(value: float, shown: str) -> None:
    assert human_count(value) == shown
