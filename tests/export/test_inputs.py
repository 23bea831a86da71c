"""Files of networks whose inputs and outputs are more than tensors: none is a constant, or another network."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import _deregister_pytree_node, register_pytree_node

from lightning_light.errors import ParityError, TraceError
from lightning_light.example_input import ExampleInput
from lightning_light.export import export_model, load_exported
from tests.zoo import noise, tokens

# Two ways to trace; the formats of one of them take turns.
DATACLASS_FORMATS = ["ptl", pytest.param("onnx", marks=pytest.mark.slow), "pte"]
UNUSED_FORMATS = ["ptl", "onnx", pytest.param("pte", marks=pytest.mark.slow)]
QUICK: dict[str, Any] = {"latency_runs": 1}


class ModelOutput(OrderedDict[str, Any]):
    """In the manner of transformers: a dict whose items are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclass
class Sample:
    """A batch of a user's: tensors, a list of them, and values that are none."""

    image: Tensor
    names: list[str]
    extra: list[Tensor | None]
    label: Tensor | None = None


class Graph:
    """A batch object that is no container of Python's: features of nodes, and edges between them."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.store = {"x": x, "edges": edges}

    @property
    def x(self) -> Tensor:
        return self.store["x"]


class OnSample(nn.Module):
    """A dataclass in, a model output out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, sample: Sample) -> ModelOutput:
        logits = self.fc(sample.image + sample.extra[1])
        loss = None if sample.label is None else nn.functional.cross_entropy(logits, sample.label)
        return ModelOutput(logits=logits, loss=loss, hidden=(None, logits.relu()))


class OnGraph(nn.Module):
    """One round of messages along the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, graph: Graph) -> dict[str, Any]:
        source, target = graph.store["edges"][0], graph.store["edges"][1]
        sums = torch.zeros_like(graph.x).index_add(0, target, graph.x[source])
        return {"nodes": self.fc(graph.x + sums), "aux": None}


def sample(size: int) -> Sample:
    return Sample(noise(size, 4), ["a"] * size, [None, noise(size, 4)])


def graph(nodes: int, edges: int) -> Graph:
    return Graph(noise(nodes, 4), tokens(2, edges, below=nodes))


@pytest.mark.parametrize("suffix", DATACLASS_FORMATS)
def test_dataclasses_are_taken_apart(suffix: str, tmp_path: Path) -> None:
    net, path = OnSample().eval(), tmp_path / f"m.{suffix}"
    report = export_model(net, sample(2), path, data=[ExampleInput((sample(3),)), ExampleInput((sample(1),))], **QUICK)
    assert [one["name"] for one in report.inputs] == ["sample.image", "sample.extra[1]"]
    assert report.built_in["sample.extra[0]"] == "None"
    assert report.parity_batches == 2
    given = sample(4)
    found = load_exported(path)(given.image, given.extra[1])
    expected = net(given)
    torch.testing.assert_close(sorted(found, key=lambda one: one.min()), [expected.logits, expected.hidden[1]])


def test_a_batch_object_is_taken_apart(tmp_path: Path) -> None:
    net, path = OnGraph().eval(), tmp_path / "m.ptl"
    batches = [ExampleInput((graph(5, 7),)), ExampleInput((graph(3, 2),))]
    report = export_model(net, graph(4, 6), path, data=batches, batch="as_given", **QUICK)
    assert ([one["name"] for one in report.inputs], report.parity_batches) == (
        ["graph.store['x']", "graph.store['edges']"],
        2,
    )
    given = graph(6, 9)
    torch.testing.assert_close(
        load_exported(path, batch="as_given")(given.x, given.store["edges"]), net(given)["nodes"]
    )
    with pytest.raises(TraceError, match=r"`OnGraph.forward`.*on a batch of 1 .*need `batch='as_given'`"):
        export_model(net, graph(4, 6), path, **QUICK)


def test_an_object_registered_with_pytree(tmp_path: Path) -> None:
    class Packed:
        """Holds its tensors as one, and cannot be copied."""

        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.both = torch.stack([x, y])

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot be copied")

    class OnPacked(nn.Module):
        def forward(self, pack: Packed) -> Tensor:
            return pack.both[0] * 2 + pack.both[1]

    packed = Packed(noise(2, 4), noise(2, 4))
    with pytest.raises(TraceError, match=r"forward\(pack=...\)`: .*of type Packed, .*register_pytree_node"):
        export_model(OnPacked(), ExampleInput((packed,)), tmp_path / "m.ptl", **QUICK)
    register_pytree_node(Packed, lambda one: ([one.both[0], one.both[1]], None), lambda both, _: Packed(*both))
    try:
        report = export_model(OnPacked(), ExampleInput((packed,)), tmp_path / "m.ptl", **QUICK)
        x, y = noise(3, 4), noise(3, 4) + 1
        assert torch.equal(load_exported(tmp_path / "m.ptl")(x, y), x * 2 + y)
        assert [one["name"] for one in report.inputs] == ["pack[0]", "pack[1]"]
    finally:
        _deregister_pytree_node(Packed)


class Lengths(nn.Module):
    """Python's numbers, which vary per batch, beside a tensor."""

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        return x[:, : lengths[0]].sum(1)


def test_values_that_vary_per_batch_are_a_failure_by_name(tmp_path: Path) -> None:
    batches = [ExampleInput((noise(1, 4), [2])), ExampleInput((noise(1, 4), [3]))]
    with pytest.raises(ParityError, match=r"constants of the file: lengths=\[3\] \(in the file \[2\]\)"):
        export_model(Lengths(), batches[0], tmp_path / "m.ptl", batch="as_given", data=batches, **QUICK)
    assert not list(tmp_path.iterdir())


class Constant(nn.Module):
    """What leaves torch is a constant of a trace."""

    def __init__(self, through: str) -> None:
        super().__init__()
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        values = torch.from_numpy(x.numpy().copy()) if self.through == "numpy" else torch.tensor(x.tolist())
        return values + x.mean() if self.through == "part" else values


@pytest.mark.parametrize(
    ("net", "example", "error", "sentence"),
    [
        (Constant("numpy"), noise(1, 3), TraceError, "expected outputs that are computed from x.*would be a constant"),
        (Constant("part"), noise(1, 3), ParityError, "outside the tolerance"),
        (OnGraph(), [3], TraceError, r"expected an input that is a tensor .* found \['graph'\] without one"),
    ],
    ids=["numpy", "part", "no inputs"],
)
@pytest.mark.filterwarnings("ignore:`TorchScriptLite:UserWarning")
def test_a_file_that_would_be_constant_is_refused(
    net: nn.Module, example: Any, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence):
        export_model(net, ExampleInput((example,)), tmp_path / "m.ptl", **QUICK)
    assert not list(tmp_path.iterdir())


class Labelled(nn.Module):
    """A loss where there are labels, as published modules compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Any], weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.fc(batch["x"]) if mask is None else self.fc(batch["x"]) * mask
        return {"logits": logits, **({"loss": (logits - batch["y"]).mean()} if "y" in batch else {})}


def labelled(size: int, **others: Any) -> ExampleInput:
    return ExampleInput(({"x": noise(size, 4), **others}, noise(size)), {"mask": noise(size, 1)})


@pytest.mark.parametrize("suffix", UNUSED_FORMATS)
def test_inputs_that_change_no_output_are_left_out(suffix: str, tmp_path: Path) -> None:
    example = labelled(2, names=["a", "b"], z=noise(2, 5))
    report = export_model(
        Labelled(), example, tmp_path / f"m.{suffix}", data=[labelled(3, names=["c"], z=noise(3, 5))], **QUICK
    )
    assert [one["name"] for one in report.inputs] == ["batch['x']", "mask"]
    assert report.parity_batches == 1


def test_inputs_that_are_not_wanted_are_left_out(tmp_path: Path) -> None:
    net, path, example = Labelled().eval(), tmp_path / "m.ptl", labelled(2, y=noise(2, 3))
    assert [one["name"] for one in export_model(net, example, path, **QUICK).inputs] == [
        "batch['x']",
        "batch['y']",
        "mask",
    ]
    report = export_model(net, example, path, inputs=["batch['x']"], data=[labelled(3, y=noise(3, 3))], **QUICK)
    assert ([one["name"] for one in report.inputs], report.parity_batches) == (["batch['x']"], 1)
    x = noise(5, 4)
    assert torch.equal(load_exported(path)({"x": x}), net.fc(x))
    for inputs, sentence in (
        (["mask"], r"found that batch\['x'\], batch\['y'\] is not among them, and has no default"),
        (
            ["image"],
            r"`inputs=\['image'\]`: expected inputs .*\(batch\['x'\], batch\['y'\], weight, mask\), found image",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            export_model(net, example, path, inputs=inputs, **QUICK)


class ByShape(nn.Module):
    """Reads the shape of its second input alone."""

    def forward(self, x: Tensor, like: Tensor, scale: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) + torch.ones(like.shape[0], 2) * float(scale)


@pytest.mark.filterwarnings("ignore:`TorchScriptLite:UserWarning")
def test_an_input_that_is_read_through_python_is_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(ParityError):  # `scale` became a constant, which other values of it show
        export_model(ByShape(), (noise(2, 3), noise(2, 5), torch.tensor(2.0)), tmp_path / "m.ptl", **QUICK)
