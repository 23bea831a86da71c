"""k-means, Huffman codes and files against plain formulas; training with clustered weights."""

import heapq
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from lightning_light.budgets import Sparsity
from lightning_light.clustering import (
    DKM,
    CentroidTraining,
    StraightThroughEstimator,
    WeightClustering,
    WeightClusteringOptions,
    cluster,
    clustered_sizes,
    load_clustered,
    save_clustered,
)
from lightning_light.clustering.cluster_training import Clusters
from lightning_light.clustering.coding import code_lengths, decode, encode, entropy
from lightning_light.clustering.kmeans import kmeans
from lightning_light.quantization import Int8, MovingAverage, QuantizationAwareTraining
from lightning_light.schedules import OneShot
from lightning_light.sparsity import WeightPruning
from tests.contract.bodies import Body, module_class
from tests.contract.runs import checkpoints, trainer

SEEDS = st.integers(0, 10**6)


def lit() -> object:
    import lightning.pytorch

    return module_class(Body, lightning.pytorch)()


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 6), st.sampled_from(["linear", "density"]))
def test_k_means_reaches_a_fixed_point_of_lloyd(seed, clusters, initialization) -> None:
    values = torch.randn(2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    centroids, places = kmeans(values, clusters, initialization=initialization, zero_centroid=False, iterations=200)
    for row, book, place in zip(values, centroids, places, strict=True):
        distances = (row[:, None] - book[None, :]).abs()
        assert torch.equal(distances.min(1).values, distances.gather(1, place[:, None])[:, 0])  # each has its nearest
        for number in place.unique().tolist():
            torch.testing.assert_close(book[number], row[place == number].mean())  # and each is its members' mean


def test_zeros_keep_a_centroid_of_their_own() -> None:
    values = torch.tensor([[0.0, 0.0, 0.001, -0.001, 1.0, 0.9, 0.0, -2.0]])
    centroids, places = kmeans(values, 3, initialization="linear", zero_centroid=True)
    assert centroids[0, 0] == 0.0
    assert ((places == 0) == (values == 0)).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any), SEEDS)
def test_huffman_is_as_short_as_can_be_and_reads_back(counts, seed) -> None:
    lengths = code_lengths(counts)
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    best = heap[0] if len(heap) == 1 else 0  # the cost of a Huffman code is the sum of all its inner nodes
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        best += both
        heapq.heappush(heap, both)
    assert sum(count * length for count, length in zip(counts, lengths, strict=True)) == best
    assert entropy(counts) * sum(counts) <= best + 1e-9 <= (entropy(counts) + 1) * sum(counts) + 1e-9
    symbols = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(symbols)
    assert np.array_equal(decode(encode(symbols, lengths), lengths, len(symbols)), symbols)


def test_codes_stay_within_sixteen_bits() -> None:
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])  # the worst there is: one bit longer for every symbol
    lengths = code_lengths(counts)
    assert max(lengths) <= 16
    assert sum(2.0**-length for length in lengths) <= 1.0
    symbols = np.arange(30)
    assert np.array_equal(decode(encode(symbols, lengths), lengths, 30), symbols)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_file_gives_every_tensor_back_to_the_last_bit(dtype, tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 40)).to(dtype)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            rows = 1 if layer is net[0] else 40
            values = layer.weight.reshape(rows, -1).float()
            books, places = kmeans(values, 6, initialization="linear", zero_centroid=False)
            layer.weight.copy_(books.gather(1, places).reshape(layer.weight.shape))
    net[2].weight.data[0, 0] = -0.0
    rows = {row.name: row for row in save_clustered(net, tmp_path / "net.safetensors")}
    found = load_clustered(tmp_path / "net.safetensors")
    assert list(found) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 40)).to(dtype).load_state_dict(found)
    assert rows["0.weight"].bits < 8 * dtype.itemsize
    assert rows["0.weight"].values == 6
    assert rows["1.weight"].values <= 1  # written as it is, or as one value


def test_a_file_of_another_kind_or_cut_off_is_refused(tmp_path) -> None:
    (tmp_path / "other").write_bytes(b"PK" + bytes(30))
    with pytest.raises(ValueError, match="found another kind or a damaged one"):
        load_clustered(tmp_path / "other")
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"expected a file from `save_clustered`.*found format None"):
        load_clustered(tmp_path / "plain.safetensors")
    path = tmp_path / "net.safetensors"
    save_clustered(nn.Linear(4, 4), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="found another kind or a damaged one"):
        load_clustered(path)


def test_tied_tensors_and_empty_ones_are_stored(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    net.register_buffer("empty", torch.empty(0, 3))
    save_clustered(net, tmp_path / "net.safetensors")
    found = load_clustered(tmp_path / "net.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in net.state_dict().items()
    }
    assert found["empty"].shape == (0, 3)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_clustering_without_a_trainer(granularity) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 40))
    net[3].weight.data[net[3].weight.abs() < 0.1] = 0.0
    conv, zeros, bias = net[0].weight.detach().clone(), net[3].weight == 0, net[3].bias.detach().clone()
    rows = cluster(net, None, 4, granularity=granularity, targets="3")
    assert [row.name for row in rows] == ["3.weight"]
    values = net[3].weight.detach().reshape(40 if granularity == "channel" else 1, -1)
    assert all(len(row.unique()) <= 4 for row in values)
    assert torch.equal(net[3].weight == 0, zeros)
    assert torch.equal(net[0].weight, conv)
    assert torch.equal(net[3].bias, bias)


def test_centroid_training_is_a_step_on_the_shared_values() -> None:
    """The mean gradient of a cluster moves its centroid, as if it were the parameter (here by SGD)."""
    places = torch.tensor([[0, 1, 1, 2, 0, 2]])
    clusters = Clusters(torch.tensor([[0.5, -1.0, 2.0]]), places, zero_centroid=False)
    gradient = torch.randn(1, 6)
    weights = clusters.values() - 0.1 * CentroidTraining().backward(clusters, clusters.values(), gradient)
    moved, found = CentroidTraining().forward(clusters, weights)
    expected = [
        clusters.centroids[0, k] - 0.1 * gradient[0, [i for i in range(6) if places[0, i] == k]].mean()
        for k in range(3)
    ]
    torch.testing.assert_close(moved.centroids[0], torch.stack(expected))
    torch.testing.assert_close(found, moved.values())


def test_dkm_is_its_papers_iteration_and_its_gradient_is_exact() -> None:
    latent = torch.randn(1, 20, dtype=torch.float64)
    clusters = Clusters(
        torch.linspace(-1.5, 1.5, 4, dtype=torch.float64)[None], torch.zeros(1, 20, dtype=torch.long), False
    )
    method = DKM(temperature=0.1, iterations=3)
    centroids, scale = clusters.centroids[0], 0.1 * latent.var()
    for _ in range(3):  # eq. 1 and 2 of the paper, with squared distances
        attention = torch.softmax(-((latent[0][:, None] - centroids[None]) ** 2) / scale, dim=1)
        centroids = (attention * latent[0][:, None]).sum(0) / attention.sum(0)
    attention = torch.softmax(-((latent[0][:, None] - centroids[None]) ** 2) / scale, dim=1)
    moved, soft = method.forward(clusters, latent)
    torch.testing.assert_close(moved.centroids[0], centroids)
    torch.testing.assert_close(soft[0], attention @ centroids)
    direction, step = torch.randn_like(latent), 1e-6
    gradient = method.backward(clusters, latent, torch.ones_like(latent))
    variance = latent.var()

    def total(x):
        shifted = DKM(temperature=0.1 * float(variance / x.var()), iterations=3)  # the temperature has no gradient
        return shifted.forward(clusters, x)[1].sum()

    numeric = (total(latent + step * direction) - total(latent - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [CentroidTraining(), StraightThroughEstimator(), DKM()], ids=repr)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_run_ends_with_few_values_and_the_file_has_them(training, granularity, tmp_path) -> None:
    module = lit()
    path = tmp_path / "net.safetensors"
    method = WeightClustering(4, start=0.3, training=training, granularity=granularity, path=path)
    trainer(method).fit(module)
    for name in ("features.conv1.weight", "features.last.weight", "head.weight"):
        weight = module.get_parameter(name).detach()
        rows = weight.flatten(1) if granularity == "channel" else weight.reshape(1, -1)
        assert all(len(row.unique()) <= 4 for row in rows), name
    state = load_clustered(path)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert path.stat().st_size < sum(tensor.numel() * 4 for tensor in state.values())
    sizes = {row.name: row.bits for row in clustered_sizes(module)}
    assert sizes["features.conv1.weight"] < (12.0 if granularity == "channel" else 3.0)


def test_the_codebook_is_trained() -> None:
    for training in (CentroidTraining(), StraightThroughEstimator(), DKM()):
        ends = []
        for lr in (0.0, 0.05):
            module = lit()
            module.lr = lr
            trainer(WeightClustering(4, start=0.0, training=training)).fit(module)
            ends.append(module.features.conv1.weight.detach().clone())
        assert not torch.equal(*ends), training


@pytest.mark.parametrize("training", [CentroidTraining(), StraightThroughEstimator(), DKM()], ids=repr)
def test_sparsity_is_preserved(training) -> None:
    module = lit()
    masks = {}
    with torch.no_grad():
        for name in ("features.conv1", "features.conv2"):
            weight = module.get_submodule(name).weight
            masks[name] = weight.abs() > weight.abs().median()
            weight.mul_(masks[name])
    trainer(WeightClustering(8, start=0.0, training=training)).fit(module)
    for name, mask in masks.items():
        weight = module.get_submodule(name).weight
        assert torch.equal(weight != 0, mask)
        assert len(weight.unique()) <= 8


def test_fake_quantization_keeps_the_clusters() -> None:
    class FakeInt8(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            scale = weight.detach().abs().max() / 127
            return weight + ((weight / scale).round() * scale - weight).detach()

    module = lit()
    for layer in (module.features.conv1, module.head):
        parametrize.register_parametrization(layer, "weight", FakeInt8())
    trainer(WeightClustering(6, start=0.2)).fit(module)
    for layer in (module.features.conv1, module.head):
        assert len(layer.parametrizations.weight.original.unique()) <= 6
        assert len(layer.weight.unique()) <= 6


def test_tied_weights_are_clustered_once_and_stay_tied() -> None:
    module = lit()
    module.head = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 5))
    module.head[2].weight = module.head[0].weight
    trainer(WeightClustering(4, start=0.2)).fit(module)
    assert module.head[2].weight is module.head[0].weight
    assert len(module.head[0].weight.unique()) <= 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clusters": 1}, "expected 2 <= clusters <= 256"),
        ({"clusters": 300}, "expected 2 <= clusters <= 256"),
        ({"granularity": "row"}, "expected one of 'layer', 'channel'"),
        ({"initialization": "kmeans++"}, "expected one of 'linear', 'density'"),
    ],
)
@pytest.mark.parametrize("call", [WeightClustering, WeightClusteringOptions])
def test_bad_values_are_refused(call, options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(**options)


def test_further_values_are_refused() -> None:
    with pytest.raises(ValueError, match="a fraction of the run"):
        WeightClustering(start=1.5)
    with pytest.raises(TypeError, match=r"Write `cluster\(model, None, 8\)`"):
        cluster(nn.Linear(8, 8), 8)
    with pytest.raises(TypeError, match="expected a ClusterTraining"):
        WeightClustering(training="dkm")
    with pytest.raises(TypeError, match="Pass an instance"):
        WeightClustering(training=DKM)


def test_an_epoch_after_the_end_of_the_run_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"`WeightClustering\(start=7\)`: expected an epoch of the run"):
        trainer(WeightClustering(start=7)).fit(lit())


def test_entropy_is_shannons() -> None:
    for counts in itertools.product([1, 2, 5], repeat=3):
        shares = [count / sum(counts) for count in counts]
        assert math.isclose(entropy(counts), -sum(share * math.log2(share) for share in shares))


@pytest.mark.parametrize("training", [CentroidTraining(), StraightThroughEstimator(), DKM()], ids=repr)
def test_pruned_then_clustered_then_quantized_keeps_sparsity_and_clusters(training) -> None:
    import lightning.pytorch

    layers = ("features.conv1", "head")
    zeros: list[torch.Tensor] = []
    rounded: list[torch.Tensor] = []

    class Look(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer: object, pl_module: nn.Module, batch: object, batch_idx: int) -> None:
            """The masks, before the weights share values in the fifth step."""
            if trainer.global_step == 3:
                zeros.extend(pl_module.get_submodule(name).weight == 0 for name in layers)

        def on_train_end(self, trainer: object, pl_module: nn.Module) -> None:
            """What the network computes with, while its weights are still rounded."""
            rounded.extend(pl_module.get_submodule(name).weight.detach() for name in layers)

    module = lit()
    trainer(
        WeightPruning(Sparsity(0.5), schedule=OneShot(at=0.1)),
        WeightClustering(6, start=0.35, training=training),
        QuantizationAwareTraining(Int8(observer=MovingAverage(0.9)), start=0.6, calibration_batches=2),
        Look(),
    ).fit(module)
    for name, mask, seen in zip(layers, zeros, rounded, strict=True):
        weight = module.get_submodule(name).weight.detach()
        assert mask.any()
        assert torch.equal(weight == 0, mask)  # zeros have a centroid of their own, and nothing else has it
        assert len(weight.unique()) <= 6
        if not isinstance(training, DKM):  # DKM is soft until the end
            assert all(len(row.unique()) <= 6 for row in seen.flatten(1))  # a scale for each channel, six values in it
            assert (seen[mask] == 0).all()


@pytest.mark.parametrize(
    ("kind", "order", "training"),
    [
        ("ema", "before", CentroidTraining()),
        ("ema", "after", StraightThroughEstimator()),
        ("swa", "before", StraightThroughEstimator()),
        ("swa", "after", CentroidTraining()),
    ],
)
@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning", "ignore:Be aware that when using `ckpt_path`")
def test_averaged_copies_are_clustered_at_every_validation_and_save(training, kind, order, tmp_path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    seen: list[int] = []

    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer: object, pl_module: object, *_: object) -> None:
            if trainer.current_epoch > 0:
                seen.append(len(pl_module.head.weight.unique()))

    def run(module: object, resume: object) -> dict[str, torch.Tensor]:
        swa = {"swa_lrs": 0.01, "swa_epoch_start": 2, "annealing_epochs": 1}
        average = EMAWeightAveraging(decay=0.9) if kind == "ema" else StochasticWeightAveraging(**swa)
        clustering = WeightClustering(4, start=0.3, training=training)
        both = [average, clustering] if order == "before" else [clustering, average]
        saving = checkpoints(tmp_path) if resume is None else ()
        trainer(*both, Look(), *saving, max_epochs=4).fit(module, ckpt_path=resume)
        return module.state_dict()

    module = lit()
    weights = run(module, None)
    assert seen
    assert max(seen) <= 4
    assert all(len(value.unique()) <= 4 for value in weights.values() if value.ndim > 1)
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert all(len(value.unique()) <= 4 for value in saved["state_dict"].values() if value.ndim > 1)
    if kind == "ema":
        live = saved["current_model_state"]
        assert not torch.equal(saved["state_dict"]["head.weight"], live["head.weight"])  # an average, not a copy
        assert not torch.equal(weights["head.weight"], live["head.weight"])
        resumed = run(lit(), tmp_path / "epoch=1.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
