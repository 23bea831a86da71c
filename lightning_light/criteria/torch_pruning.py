"""Use an importance of torch-pruning as a criterion of structured pruning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_light.criteria.data import own_gradients
from lightning_light.criteria.group_criterion import GroupCriterion
from lightning_light.criteria.random import drawn_seed
from lightning_light.validation import validated

if TYPE_CHECKING:
    from lightning_light.criteria.gathered import Gathered
    from lightning_light.dependency import ChannelGroup, Member

__all__ = ["FromTorchPruning"]

Gradients = Literal["auto", "mean", "squared", "none"]

_EVIDENCE = {"mean": "grad", "squared": "grad_squared"}
_LAYERS = ("CONV", "DEPTHWISE_CONV", "LINEAR", "BN", "LN", "GN", "IN", "PRELU", "EMBED", "PARAMETER")


@validated
@dataclass(frozen=True, repr=False)
class FromTorchPruning(GroupCriterion):
    """Score coupled channels with an importance of torch-pruning, or with a subclass of your own.

    The importance is called with a group as torch-pruning makes it: all layers that lose positions when the channels
    leave, with their indices. Its own ``group_reduction`` and ``normalizer`` apply. Recurrent layers and what is inside
    an ``nn.MultiheadAttention`` are not in the group, and the group does not belong to a ``tp.DependencyGraph``.

    Fang et al., 2023, "DepGraph: Towards Any Structural Pruning". https://arxiv.org/abs/2301.12900

    Example:
        >>> import torch_pruning as tp
        >>> FromTorchPruning(tp.importance.GroupMagnitudeImportance(p=1))
        FromTorchPruning(GroupMagnitudeImportance(p=1))

    Args:
        importance: an instance, for instance ``tp.importance.LAMPImportance()``.
        gradients: what the importance finds in ``weight.grad``: the ``"mean"`` over the gathered batches, the mean of
            the ``"squared"`` ones, or ``"none"``. ``"auto"``: as torch-pruning's Taylor and Hessian importances and
            their subclasses have it, and none for others.
        seed: of the random numbers that the importance draws; global random state is not touched.

    Raises:
        TypeError: ``importance`` is not an instance of ``tp.importance.Importance``.
        ValueError: ``gradients`` is unknown.
    """

    importance: Callable[[Any], Tensor | None]
    gradients: Gradients = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        from torch_pruning import importance

        if not isinstance(self.importance, importance.Importance):
            is_class = inspect.isclass(self.importance)
            name = getattr(self.importance, "__name__", None) or repr(self.importance)
            raise TypeError(
                f"`FromTorchPruning({name})`: expected an instance of `torch_pruning.importance.Importance`, found "
                f"{'a class' if is_class else type(self.importance).__name__}. Write for instance "
                "`FromTorchPruning(tp.importance.GroupMagnitudeImportance(p=1))`."
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # it depends on the importance
        """Random numbers, and the gradients that the importance reads."""
        return frozenset({"generator", *filter(None, [self._evidence])})

    @property
    def _evidence(self) -> str | None:
        from torch_pruning import importance

        gradients: str = self.gradients
        if gradients == "auto":
            kinds = {importance.GroupTaylorImportance: "mean", importance.GroupHessianImportance: "squared"}
            gradients = next((value for kind, value in kinds.items() if isinstance(self.importance, kind)), "none")
        return _EVIDENCE.get(gradients)

    @override
    def __repr__(self) -> str:
        parameters = inspect.signature(type(self.importance)).parameters
        values = vars(self.importance)
        given = [f"{n}={values[n]!r}" for n, p in parameters.items() if n in values and not _same(values[n], p.default)]
        mine = [f"{n}={v!r}" for n, v, d in (("gradients", self.gradients, "auto"), ("seed", self.seed, 0)) if v != d]
        importance = f"{type(self.importance).__name__}({', '.join(given)})"
        return f"FromTorchPruning({', '.join([importance, *mine])})"

    @override
    def score_group(
        self, model: nn.Module, group: ChannelGroup, gathered: Gathered, *, generator: torch.Generator | None = None
    ) -> Tensor | None:
        items, channels = _items(model, group)
        if not items:
            return None
        seed = drawn_seed(self.seed, generator)
        with torch.random.fork_rng(devices=[]), own_gradients(model):
            for name, parameter in model.named_parameters():  # the importance reads the evidence there
                evidence = None if self._evidence is None else gathered.get(self._evidence, name)
                parameter.grad = None if evidence is None else evidence.to(parameter)
            torch.manual_seed(seed)
            scores = self.importance(_as_tp_group(items))
        if scores is None:
            return None
        if not isinstance(scores, Tensor) or scores.ndim != 1 or len(scores) < group.width:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"`{self!r}` on `{group.name}`: expected one score per channel, shape ({group.width},), found {found}. "
                "Give the importance a `group_reduction`, for instance 'mean'."
            )
        ordered = torch.empty(group.width, dtype=scores.dtype)
        ordered[channels] = scores.detach().cpu()[: group.width]  # a root with several positions per channel is longer
        return ordered


@dataclass
class _Item:
    """One layer of a group in torch-pruning's terms: the function that would prune it, and positions by channel."""

    target: nn.Module | Tensor
    name: str
    handler: Any
    dim: int
    positions: dict[int, int]


def _items(model: nn.Module, group: ChannelGroup) -> tuple[list[_Item], Tensor]:
    """The layers of ``group``, those that make the channels first; and the channels in the order of the first's."""
    members = sorted(group.members, key=lambda member: member.role != "out")
    found: dict[tuple[int, Any], _Item] = {}
    channels = torch.arange(group.width)
    for member in members:
        item = _item_of(model, member)
        if item is None:
            continue
        index = _expanded(item, member)
        if not found:
            channels = index[:, 0].argsort()
        known = found.setdefault((id(item.target), item.handler), item)
        for channel, row in enumerate(index[channels].tolist()):
            for position in row:
                known.positions.setdefault(position, channel)
    return list(found.values()), channels


def _item_of(model: nn.Module, member: Member) -> _Item | None:
    """How torch-pruning would prune the member; None where it has no such layer, or another meaning of positions."""
    from torch_pruning import ops
    from torch_pruning.pruner.function import PrunerBox

    path, _, own = member.tensor.rpartition(".")
    module = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(module, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        return None
    target: Any = module
    if ops.module2type(module) not in PrunerBox and isinstance(getattr(module, own, None), nn.Parameter):
        target = getattr(module, own)
    kind = ops.module2type(target)
    if kind not in PrunerBox or kind not in [getattr(ops.OPTYPE, name) for name in _LAYERS]:
        return None
    reads = member.role == "in" and kind in (ops.OPTYPE.CONV, ops.OPTYPE.LINEAR)
    handler = PrunerBox[kind].prune_in_channels if reads else PrunerBox[kind].prune_out_channels
    return _Item(target, member.tensor if target is not module else path, handler, member.dim, {})


def _expanded(item: _Item, member: Member) -> Tensor:
    """Positions by channel; of a grouped convolution's input axis, which counts one group, those of all groups."""
    groups = getattr(item.target, "groups", 1)
    if member.role != "in" or groups == 1 or member.dim == 0:
        return member.index
    layer: Any = item.target
    size = layer.weight.shape[member.dim]
    return torch.cat([member.index + group * size for group in range(groups)], dim=1)


def _as_tp_group(items: Sequence[_Item]) -> Any:
    """The items as a ``tp.dependency.Group``; the first is the root."""
    from torch_pruning._helpers import GroupItem
    from torch_pruning.dependency import Dependency, Group, Node

    made, root = Group(), None
    for item in items:
        node = Node(item.target, grad_fn=None, name=item.name)
        node.pruning_dim = item.dim
        root = root or (node, item.handler)
        positions = sorted(item.positions)
        made.add_dep(Dependency(root[1], item.handler, source=root[0], target=node), positions)
        assert isinstance(made[-1], GroupItem)
        made[-1].root_idxs = [item.positions[position] for position in positions]
    return made


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)
