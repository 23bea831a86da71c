"""`WeightClustering`: the weights of a layer share a few values, and are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

from torch import Tensor, nn
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.clustering.cluster_training import CentroidTraining, Clusters, ClusterTraining
from lightning_light.clustering.codebooks import cluster_average, clusterable_weights, first_clusters, harden, weight_of
from lightning_light.clustering.files import clustered_sizes, save_clustered
from lightning_light.clustering.functional import cluster
from lightning_light.clustering.kmeans import Initialization
from lightning_light.clustering.options import ClusterCount, Granularity, WeightClusteringOptions
from lightning_light.example_input import ExampleInput
from lightning_light.formatting import plural
from lightning_light.order import DEFAULT_WINDOWS, Stage
from lightning_light.planning import not_targeted
from lightning_light.progress import epochs_planned
from lightning_light.schedules import resolve_moment
from lightning_light.schema import Context, Needs, Rule, TensorOf, damage
from lightning_light.surgery.attachment import check_owners
from lightning_light.surgery.averaged_models import averaged_models_of
from lightning_light.surgery.distributed import broadcast, log_rank_zero
from lightning_light.targets import TargetsLike, as_targets
from lightning_light.timing import is_due
from lightning_light.trained_weights import uncovered_parameters, uncovered_text
from lightning_light.validation import Moment, PositiveFloat, validated

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["WeightClustering"]


class _Assignments(Rule):
    """Indices of centroids, in as many rows as ``centroids`` has, and as many as ``latent`` has weights."""

    @override
    def check(self, value: Tensor, context: Context, path: str) -> None:
        centroids, latent = context.holder.get("centroids"), context.holder.get("latent", value)
        if centroids is None or len(centroids) != len(value) or latent.numel() != value.numel():
            raise damage(path, "one index per weight, in as many rows as `centroids` has", f"{tuple(value.shape)}")
        if value.numel() and int(value.max()) >= centroids.shape[1]:
            raise damage(path, f"indices below {centroids.shape[1]}, the number of centroids", str(int(value.max())))


class ClusteredLayer(TypedDict, total=False):
    """One clustered layer in the compression state. Its weight may have been cut or replaced since.

    Attributes:
        centroids: ``(rows, clusters)``.
        assignments: ``(rows, n)``: the index of each weight's centroid.
        zero_centroid: whether the first centroid is fixed at zero.
        latent: the trained weights, where they differ from the clustered ones.
        coded_bits: bits per weight in a file.
    """

    centroids: Annotated[Tensor, TensorOf("float", 2), Needs("assignments", "zero_centroid")]
    assignments: Annotated[Tensor, TensorOf("integer", 2, 0), _Assignments()]
    zero_centroid: bool
    latent: Annotated[Tensor, TensorOf()]
    coded_bits: PositiveFloat


class WeightClusteringState(TypedDict, total=False):
    """What `WeightClustering` keeps in the compression state, by layer."""

    layers: dict[str, ClusteredLayer]


@validated
@dataclass(eq=False, repr=False)
class WeightClustering(CompressionCallback):
    """Cluster the weights of every layer by k-means at ``start``, and train on with at most ``clusters`` values.

    It makes the file smaller, after Huffman coding by about ``32 / log2(clusters)``. It does not make the network
    faster: at run time the weights are ordinary numbers.

    Han et al., 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
    Huffman Coding". https://arxiv.org/abs/1510.00149

    The weights stay plain parameters, which hold their clustered values at every validation, checkpoint and export.
    Masked weights keep a centroid at zero; fake quantization of a clustered layer maps equal weights to equal ones.

    Example:
        >>> WeightClustering(8, start=0.5)
        WeightClustering(clusters=8, start=0.5)

    Args:
        clusters: different values per layer, or per output channel, from 2 to 256.
        start: an int is an epoch, a float a fraction of the run; 1.0 is before the last batch.
        granularity: ``"layer"``, one codebook per layer; ``"channel"``, one per output channel.
        training: how the weights are trained on: `CentroidTraining`, `StraightThroughEstimator` or `DKM`.
        initialization: of k-means: ``"linear"`` or ``"density"``.
        preserve_sparsity: weights that are zero at ``start`` stay zero, with a centroid of their own.
        targets: layers to cluster: patterns or `Targets`; all with a weight of two or more axes by default.
        path: a file for `load_clustered`, written at the end of the run; None for none.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range.
        TargetError: ``targets`` match nothing.
        UnsupportedError: a later method owns one of the layers.
    """

    method: ClassVar[str] = "weight_clustering"
    state_schema: ClassVar[Any] = WeightClusteringState
    stage: ClassVar[int] = Stage.CLUSTERING
    structural: ClassVar[bool] = False
    whole_parameters: ClassVar[tuple[str, str] | None] = (
        "the weights of a layer share values",
        "Cluster on one device or with `strategy='ddp'`.",
    )

    clusters: ClusterCount = WeightClusteringOptions.clusters
    _: KW_ONLY
    start: Moment = DEFAULT_WINDOWS[Stage.CLUSTERING][0]
    granularity: Granularity = WeightClusteringOptions.granularity
    training: ClusterTraining = CentroidTraining()
    initialization: Initialization = WeightClusteringOptions.initialization
    preserve_sparsity: bool = WeightClusteringOptions.preserve_sparsity
    targets: TargetsLike = WeightClusteringOptions.targets
    path: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        self.options = self.options_as(WeightClusteringOptions)
        self._stepped: set[str] = set()

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the epoch, and refuse one after the end of the run."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._start_fraction(epochs_planned(trainer))
            self.disclaim(pl_module)  # a fit starts over, unless a checkpoint brings the claim back

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights, so that targets that match nothing are refused."""
        super().on_fit_start(trainer, pl_module)
        layers = dict(clusterable_weights(pl_module, self.options))
        if not self.resumed(pl_module):
            check_owners(pl_module, layers, method=self.method, stage=self.stage)
            self.state(pl_module).clear()
        self._stepped = set()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Cluster the weights, if that is due."""
        if "layers" not in self.state(pl_module) and is_due(trainer, self._start_fraction(epochs_planned(trainer))):
            self._cluster(trainer, pl_module, self._helper_networks(trainer, pl_module, batch) or [])

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Exchange the clustered weights for the latent ones, and their gradients."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter, entry in self._entries(pl_module):
            if id(parameter) in own and parameter.grad is not None:
                clusters = Clusters.of(entry, parameter)
                latent = _rows(entry.get("latent", parameter.detach()).to(parameter.device), clusters)
                gradient = _rows(parameter.grad, clusters).to(latent.dtype)
                found = self.training.backward(clusters, latent, gradient)
                parameter.grad.copy_(found.reshape(parameter.shape))
                parameter.data.copy_(latent.reshape(parameter.shape))
                self._stepped.add(name)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cluster the weights that the optimizer has updated."""
        for name, parameter, entry in self._entries(pl_module):
            if name in self._stepped:
                self._update(parameter, entry)
        if self._stepped:
            self._cluster_averages(trainer, pl_module)
        self._stepped = set()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set every weight to its centroid exactly, and log the sizes."""
        super().on_train_end(trainer, pl_module)
        if self.state(pl_module).get("layers"):
            self._harden(trainer, pl_module)
            self._report(trainer, pl_module)

    @override
    def _no_effect_reason(self, pl_module: LightningModule) -> str | None:
        if self.state(pl_module).get("layers"):
            return None
        if "layers" not in self.state(pl_module):
            return f"the run ended before `start={self.start!r}`."
        return "no targeted layer has a weight of two or more axes that is large enough for a codebook."

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repeat that, since an average may have replaced the weights; then write the file."""
        if self.state(pl_module).get("layers"):
            self._harden(trainer, pl_module)
            if self.path is not None and trainer.is_global_zero:
                save_clustered(pl_module, str(self.path))

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """The moment at which weights begin to share values."""
        start = self._start_fraction(max_epochs)
        return (start, start)

    @override
    def rehearse(self, model: nn.Module, example: ExampleInput, batches: Sequence[Any]) -> list[str]:
        """Cluster the weights."""
        found = cluster(model, example, **vars(self.options))
        lines = [f"{one.name}: {one.values} values, {one.bits:.2f} bits per weight when coded" for one in found]
        return lines + not_targeted(model, [one.name.rpartition(".")[0] for one in found])

    # Private.

    def _start_fraction(self, max_epochs: int | None) -> float:
        return resolve_moment(self.start, max_epochs, f"{type(self).__name__}(start={self.start})")

    def _cluster(self, trainer: Trainer, pl_module: LightningModule, left_alone: list[str]) -> None:
        weights = dict(clusterable_weights(pl_module, self.options, left_alone=left_alone))
        found = ((name, first_clusters(weight, self.options)) for name, weight in weights.items())
        layers = {name: broadcast(trainer, clusters.entry()) for name, clusters in found}
        if uncovered := uncovered_parameters(pl_module, as_targets(self.options.targets), weights.values()):
            log_rank_zero(trainer, f"{self.method}: {uncovered_text(uncovered)}")
        self.state(pl_module)["layers"] = layers
        self.claim(pl_module, layers)
        for _, parameter, entry in self._entries(pl_module):
            if self.training.has_latent:
                entry["latent"] = parameter.detach().clone()
            self._update(parameter, entry)
        self._cluster_averages(trainer, pl_module)
        self._report(trainer, pl_module)

    def _update(self, parameter: nn.Parameter, entry: dict[str, Any]) -> None:
        """After a step: set the network's weights to the clustered ones, and keep the latent ones in the state."""
        clusters = Clusters.of(entry, parameter)
        latent = parameter.detach().clone()
        updated, weights = self.training.forward(clusters, _rows(latent, clusters))
        entry |= updated.entry()
        if self.training.has_latent:
            entry["latent"] = latent
        parameter.data.copy_(weights.reshape(parameter.shape))

    def _harden(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give every layer its few values; of weights that an average may have replaced, those of the average."""
        give = cluster_average if averaged_models_of(trainer, pl_module) else harden
        for _, parameter, entry in self._entries(pl_module):
            entry |= give(parameter, Clusters.of(entry, parameter)).entry()

    def _cluster_averages(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster averaged copies of the network like the network itself."""
        for average in averaged_models_of(trainer, pl_module):
            for _, parameter, entry in self._entries(pl_module, average):
                cluster_average(parameter, Clusters.of(entry, parameter))

    def _entries(
        self, pl_module: LightningModule, model: nn.Module | None = None
    ) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        """Yield the clustered layers, of an averaged copy if one is given, without those replaced or cut since."""
        layers: dict[str, dict[str, Any]] = self.state(pl_module).get("layers", {})
        modules = dict((model or pl_module).named_modules()) if layers else {}
        for name, entry in layers.items():
            weight = weight_of(modules[name]) if name in modules else None
            if weight is not None and weight.numel() == entry["assignments"].numel():
                yield name, weight, entry

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the bits per weight."""
        weights = {name: parameter for name, parameter, _ in self._entries(pl_module)}
        bits = {name: clustered_sizes({"weight": weight})[0].bits for name, weight in weights.items()}
        count = max(sum(weight.numel() for weight in weights.values()), 1)
        total = sum(bits[name] * weight.numel() for name, weight in weights.items()) / count
        curves = {f"bits/{name or 'weight'}": value for name, value in bits.items()}
        self.log_scalars(trainer, curves | {"bits": total})
        for name, value in bits.items():
            self.state(pl_module)["layers"][name]["coded_bits"] = value
        values = f"{plural(len(bits), 'layer')} of at most {self.options.clusters} values"
        self.log_event(trainer, pl_module, f"{values}, {total:.2f} bits per weight when coded")


def _rows(tensor: Tensor, clusters: Clusters) -> Tensor:
    return tensor.reshape(clusters.assignments.shape)
