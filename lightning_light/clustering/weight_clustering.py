"""`WeightClustering`: the weights of a layer share a few values, and go on learning."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_light.callback import CompressionCallback
from lightning_light.clustering.files import clustered_sizes, save_clustered
from lightning_light.clustering.kmeans import Initialization, assign, cluster
from lightning_light.clustering.training import CentroidTraining, Clusters, Learning
from lightning_light.order import Stage
from lightning_light.progress import steps_done, steps_planned, training_progress
from lightning_light.surgery.distributed import broadcast, log_rank_zero
from lightning_light.targets import Targets, as_targets

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["WeightClustering"]

_SMALLEST = 4  # weights a value, below which a codebook is larger than what it stands for


class WeightClustering(CompressionCallback):
    """From ``start`` on every layer has at most ``clusters`` different weights, and trains with them.

    It makes the file smaller, after Huffman coding by about ``32 / log2(clusters)``. It does not make the network
    faster: at run time the weights are ordinary numbers again.

    Han et al., 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
    Huffman Coding". https://arxiv.org/abs/1510.00149

    The weights stay plain parameters, which hold their clustered values at every validation, checkpoint and export.
    Masked weights keep a centroid at zero; fake quantization of a clustered layer maps equal weights to equal
    ones.

    Example:
        >>> WeightClustering(8, start=0.3)
        WeightClustering(clusters=8, start=0.3)

    Args:
        clusters: different values of a layer, or of each channel, from 2 to 256.
        start: when; an int is an epoch, a float a fraction of the run. 1.0 is before the last batch.
        granularity: ``"layer"``, one codebook for a layer; ``"channel"``, one for each output channel.
        learning: how it trains on: `CentroidTraining`, `StraightThrough` or `DKM`.
        initialization: of k-means: ``"linear"`` or ``"density"``.
        keep_zeros: what is zero at ``start`` stays zero, with a centroid of its own.
        targets: layers to cluster: patterns or `Targets`; all with a weight of two or more axes by default.
        path: at the end of the run, a file for `load_clustered`; None for none.

    Raises:
        ValueError: an argument out of range; said at once.
        TargetError: ``targets`` name nothing.
    """

    method: ClassVar[str] = "weight_clustering"
    stage: ClassVar[int] = Stage.FACTORS
    structural: ClassVar[bool] = False

    def __init__(
        self,
        clusters: int = 16,
        *,
        start: int | float = 0.5,
        granularity: Literal["layer", "channel"] = "layer",
        learning: Learning = CentroidTraining(),
        initialization: Initialization = "linear",
        keep_zeros: bool = True,
        targets: Targets | str | list[str] | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        _check(clusters, start, granularity, initialization)
        self.clusters = clusters
        self.start = start
        self.granularity: Literal["layer", "channel"] = granularity
        self.learning = learning
        self.initialization: Initialization = initialization
        self.keep_zeros = keep_zeros
        self.targets = targets
        self.path = path
        self._moved: set[str] = set()

    # Lightning's hooks, in the order a run meets them.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve an epoch, so that one that never comes is said before anything is trained."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._fraction(trainer.max_epochs)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the layers as they are now."""
        super().on_fit_start(trainer, pl_module)
        as_targets(self.targets).select(pl_module)
        if not self.resumed(pl_module):
            self.state(pl_module).clear()
        self._moved = set()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Cluster, when it is time."""
        state = self.state(pl_module)
        if "layers" not in state and self._is_due(trainer):
            self._cluster(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Give the optimizer the weights behind the clustered ones, and their gradients."""
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter, entry in self._entries(pl_module):
            if id(parameter) in mine and parameter.grad is not None:
                clusters = _clusters(entry, parameter)
                latent = _rows(entry.get("latent", parameter.detach()).to(parameter.device), clusters)
                gradient = _rows(parameter.grad, clusters).to(latent.dtype)
                found = self.learning.backward(clusters, latent, gradient)
                parameter.grad.copy_(found.reshape(parameter.shape))
                parameter.data.copy_(latent.reshape(parameter.shape))
                self._moved.add(name)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cluster again what the optimizer has moved."""
        for name, parameter, entry in self._entries(pl_module):
            if name in self._moved:
                self._put(parameter, entry)
        self._moved = set()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make every weight a centroid exactly; say what that comes to."""
        if not self.state(pl_module).get("layers"):
            if not getattr(trainer, "fast_dev_run", False):
                self._no_effect(self._why_nothing(pl_module))
            return
        self._harden(pl_module)
        self._report(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once more, if an average has taken the weights' place meanwhile; then write the file."""
        if self.state(pl_module).get("layers"):
            self._harden(pl_module)
            if self.path is not None and trainer.is_global_zero:
                save_clustered(pl_module, str(self.path))

    @override
    def window(self, max_epochs: int | None) -> tuple[float, float] | None:
        """The moment at which weights begin to share values."""
        start = self._fraction(max_epochs)
        return (start, start)

    # Private: the small questions the hooks ask.

    def _fraction(self, max_epochs: int | None) -> float:
        if isinstance(self.start, float):
            return self.start
        if max_epochs is None or self.start >= max_epochs:
            raise ValueError(
                f"`WeightClustering(start={self.start})` counts epochs: expected one before the end of the run, found "
                f"`Trainer(max_epochs={max_epochs})`. Give a smaller one, or a fraction of the run as a float."
            )
        return self.start / max_epochs

    def _is_due(self, trainer: Trainer) -> bool:
        last = 1.0 - 1.0 / max(steps_planned(trainer), 1)
        return min(self._fraction(trainer.max_epochs), last) <= training_progress(trainer) + 1e-9

    def _cluster(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers: dict[str, dict[str, Any]] = {}
        for name, parameter in self._weights(pl_module):
            layers[name] = broadcast(trainer, self._first(parameter))
        self.state(pl_module)["layers"] = layers
        for _, parameter, entry in self._entries(pl_module):
            if self.learning.has_latent:
                entry["latent"] = parameter.detach().clone()
            self._put(parameter, entry)
        self._report(trainer, pl_module)

    def _first(self, parameter: Tensor) -> dict[str, Any]:
        rows = parameter.detach().reshape(len(parameter) if self.granularity == "channel" else 1, -1)
        zeros = self.keep_zeros and bool((rows == 0.0).any())
        count = min(self.clusters, max(2, rows.shape[1] // _SMALLEST))
        centroids, places = cluster(rows.float(), count, initialization=self.initialization, zeros=zeros)
        return {"centroids": centroids, "places": places.to(torch.uint8), "zeros": zeros}

    def _put(self, parameter: nn.Parameter, entry: dict[str, Any]) -> None:
        """After a step: the clustered weights in the network, what lies behind them in the compression_state."""
        clusters = _clusters(entry, parameter)
        latent = parameter.detach().clone()
        moved, weights = self.learning.forward(clusters, _rows(latent, clusters))
        entry |= {"centroids": moved.centroids, "places": moved.places.to(torch.uint8)}
        if self.learning.has_latent:
            entry["latent"] = latent
        parameter.data.copy_(weights.reshape(parameter.shape))

    def _harden(self, pl_module: LightningModule) -> None:
        for _, parameter, entry in self._entries(pl_module):
            clusters = _clusters(entry, parameter)
            rows = _rows(parameter.detach(), clusters)
            places = assign(rows, clusters.centroids, free=clusters.free, zeros=clusters.zeros)
            hard = Clusters(clusters.centroids, places, clusters.zeros)
            entry["places"] = places.to(torch.uint8)
            parameter.data.copy_(hard.values().reshape(parameter.shape))

    def _weights(self, pl_module: LightningModule) -> Iterator[tuple[str, nn.Parameter]]:
        """Name of the layer -> its weight; one that several layers share only once."""
        seen: set[int] = set()
        for name, module in as_targets(self.targets).select(pl_module).items():
            weight = _weight(module)
            if weight is not None and weight.dim() > 1 and weight.numel() >= 2 * _SMALLEST and id(weight) not in seen:
                seen.add(id(weight))
                yield name, weight

    def _entries(self, pl_module: LightningModule) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        """Layers that are clustered; one that a later method has replaced, or cut, is left to that method."""
        layers: dict[str, dict[str, Any]] = self.state(pl_module).get("layers", {})
        if not layers:
            return
        modules = dict(pl_module.named_modules())
        for name, entry in layers.items():
            weight = _weight(modules[name]) if name in modules else None
            if weight is not None and weight.numel() == entry["places"].numel():
                yield name, weight, entry

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bits a weight, on every logger and in one line."""
        rows = {name: self._size(parameter) for name, parameter, _ in self._entries(pl_module)}
        weights = {name: parameter.numel() for name, parameter, _ in self._entries(pl_module)}
        total = sum(rows[name] * weights[name] for name in rows) / max(sum(weights.values()), 1)
        scalars = {f"{self.method}/bits/{name}": bits for name, bits in rows.items()} | {f"{self.method}/bits": total}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=steps_done(trainer))
        for name, bits in rows.items():
            self.state(pl_module)["layers"][name]["coded_bits"] = bits
        log_rank_zero(
            trainer,
            f"{self.method}: {len(rows)} layers with at most {self.clusters} values, {total:.2f} bits a weight after "
            "Huffman coding, codebooks included; the file gets smaller, the network does not get faster",
        )

    @staticmethod
    def _size(parameter: Tensor) -> float:
        (row,) = clustered_sizes({"weight": parameter})
        return row.bits

    def _why_nothing(self, pl_module: LightningModule) -> str:
        if "layers" in self.state(pl_module):
            return "no targeted layer has a weight of two or more axes that is large enough for a codebook."
        return f"the run ended before `start={self.start!r}`."


def _weight(module: nn.Module) -> nn.Parameter | None:
    """The parameter behind the layer's weight, also where a parametrization computes the weight from it."""
    if parametrize.is_parametrized(module, "weight"):
        found = getattr(module.parametrizations, "weight", None)
        original = getattr(found, "original", None)
        return original if isinstance(original, nn.Parameter) else None
    weight = module._parameters.get("weight")
    return weight if weight is not None and not nn.parameter.is_lazy(weight) else None


def _clusters(entry: dict[str, Any], parameter: Tensor) -> Clusters:
    centroids: Tensor = entry["centroids"].to(parameter)
    return Clusters(centroids, entry["places"].to(parameter.device).long(), entry["zeros"])


def _rows(tensor: Tensor, clusters: Clusters) -> Tensor:
    return tensor.reshape(clusters.places.shape)


def _check(clusters: int, start: float, granularity: str, initialization: str) -> None:
    if not isinstance(clusters, int) or not 2 <= clusters <= 256:
        raise ValueError(f"`WeightClustering({clusters!r})`: expected from 2 to 256 clusters; 16 take four bits.")
    fits = start >= 0 if isinstance(start, int) else 0.0 <= start <= 1.0
    if isinstance(start, bool) or not fits:
        raise ValueError(
            f"`WeightClustering(start={start!r})`: expected a fraction of the run (float in [0, 1]) or an epoch "
            "(int >= 0). Mind the difference between 1 and 1.0."
        )
    if granularity not in {"layer", "channel"}:
        raise ValueError(f"`WeightClustering(granularity={granularity!r})`: expected 'layer' or 'channel'.")
    if initialization not in {"linear", "density"}:
        raise ValueError(f"`WeightClustering(initialization={initialization!r})`: expected 'linear' or 'density'.")
