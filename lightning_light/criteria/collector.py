"""Gather the evidence that criteria and fits read: from the batches of a training run, or from data at hand.

One `EvidenceCollector` serves every method. What it has gathered lies in a plain dict of the method's state, so that it
is in checkpoints and a run that was interrupted while gathering continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_light.criteria.evidence import Criterion, Evidence, GroupCriterion, full_precision
from lightning_light.criteria.movement import Movement
from lightning_light.errors import UnsupportedError
from lightning_light.example_input import ExampleInput
from lightning_light.host.patches import RunHook
from lightning_light.isolation import isolated, plain_attention
from lightning_light.nested import tensors_in
from lightning_light.schema import TensorOf, damage
from lightning_light.surgery.edit import take
from lightning_light.validation import NonNegativeInt, PositiveInt, validated

__all__ = [
    "KINDS",
    "EvidenceCollector",
    "EvidenceStorage",
    "Gathered",
    "check_needs",
    "collect_evidence",
    "example_of_batch",
    "input_rows",
]

PARAMETER_KINDS = frozenset({"grad", "grad_squared", "movement"})
LAYER_KINDS = frozenset({"activation", "inputs", "input_absolute", "input_covariance"})
KINDS = PARAMETER_KINDS | LAYER_KINDS
"""What can be gathered.

By parameter name: ``"grad"`` (mean gradient), ``"grad_squared"`` (mean squared gradient, the empirical Fisher
information) and ``"movement"`` (accumulated over all optimizer steps by `Movement.accumulate`). By layer name:
``"activation"`` (mean absolute output, per channel), ``"inputs"`` (L2 norm of the inputs, per input channel),
``"input_absolute"`` and ``"input_covariance"`` (mean of ``|x|`` and of ``x x^T`` over all positions, shapes
``(groups, in)`` and ``(groups, in, in)``; for a convolution ``x`` is the patch under the kernel).

The inputs of an `nn.MultiheadAttention` called ``attn`` are under ``attn:query``, ``attn:key`` and ``attn:value``.
"""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
_ATTENTION_INPUTS = ("query", "key", "value")


class EvidenceSum(TypedDict):
    """A running sum and how much was added."""

    total: Annotated[Tensor, TensorOf()]
    count: Annotated[Tensor, TensorOf("real", 0, 0)]


class GateState(TypedDict):
    """What a `GateTrainer` keeps.

    Attributes:
        widths: group name -> number of gates.
        writers: tensors that are gated where channels are produced.
        logits: one per gate, group after group.
        mean: of the gradients, as Adam keeps it.
        square: of the gradients, as Adam keeps it.
        steps: number of steps that `mean` and `square` contain.
    """

    widths: dict[str, PositiveInt]
    writers: list[str]
    logits: Annotated[Tensor, TensorOf(ndim=1)]
    mean: Annotated[Tensor, TensorOf(ndim=1)]
    square: Annotated[Tensor, TensorOf(ndim=1, low=0)]
    steps: NonNegativeInt


class EvidenceStorage(TypedDict, total=False):
    """What an `EvidenceCollector` keeps in its storage, for the schema of a method's state.

    Attributes:
        batches: the number of batches that count.
        movement: parameter name -> movement.
        gates: of a `GateTrainer`.
    """

    batches: NonNegativeInt
    movement: dict[str, Annotated[Tensor, TensorOf()]]
    gates: GateState
    grad: dict[str, EvidenceSum]
    grad_squared: dict[str, EvidenceSum]
    activation: dict[str, EvidenceSum]
    inputs: dict[str, EvidenceSum]
    input_absolute: dict[str, EvidenceSum]
    input_covariance: dict[str, EvidenceSum]


Storage = dict[str, Any]
Loss = Callable[[Any, Any], Tensor]


@validated
def check_needs(
    call: str, criterion: Criterion, supported: frozenset[str] = KINDS, *, scores_groups: bool = False
) -> None:
    """Refuse, at construction, a criterion that needs evidence the method cannot gather.

    Args:
        call: the method's name as the user wrote it.
        criterion: the criterion.
        supported: the kinds of evidence that the method gathers.
        scores_groups: whether the method scores coupled channels, so that it can use a `GroupCriterion`.

    Raises:
        UnsupportedError: names the evidence.
    """
    if isinstance(criterion, GroupCriterion) and not scores_groups:
        raise UnsupportedError(
            f"`{call}(criterion={criterion!r})`: expected a criterion that scores single weights, found one "
            "that scores coupled channels. Use `Magnitude()` here, and this one in `StructuredPruning` or "
            "`prune_channels`."
        )
    missing = sorted(criterion.needs - supported - {"generator"} - ({"gates"} if scores_groups else set()))
    if missing:
        raise UnsupportedError(
            f"`{call}(criterion={criterion!r})`: expected a criterion that needs some of {sorted(supported)}, found "
            f"one that needs {missing}, which `{call}` does not gather. Use for instance `Magnitude()`."
        )


@dataclass(frozen=True, eq=False)
class Gathered:
    """Evidence that has been gathered: kind -> name of a parameter or layer -> tensor.

    Attributes:
        tensors: the evidence; see `KINDS` for the names and shapes.
        batches: the number of batches it was gathered from.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    batches: int = 0

    def get(self, kind: str, name: str) -> Tensor | None:
        """Return the evidence ``kind`` of the parameter or layer ``name``, or None where nothing was gathered."""
        return self.tensors.get(kind, {}).get(name)

    def pieces(
        self, needs: Iterable[str], weight: Tensor, *, name: str, layer: str, module: nn.Module, dim: int = 0
    ) -> dict[str, Tensor | None]:
        """Return what `Evidence` takes for one tensor, with the axis ``dim`` in front; None for what is missing.

        Args:
            needs: kinds of evidence; ``"generator"`` is left out.
            weight: the tensor in its own layout.
            name: of the tensor, as in ``named_parameters()``.
            layer: name of the module that uses it.
            module: that module.
            dim: the axis of ``weight`` that counts the channels.
        """
        found: dict[str, Tensor | None] = {}
        for kind in sorted(set(needs) - {"generator"}):
            if kind == "activation":
                activation = self.get(kind, layer)
                fits = activation is not None and activation.numel() == weight.shape[dim]
                found[kind] = activation if fits else None
            elif kind == "inputs":
                inputs = _inputs_like(self.tensors.get(kind, {}), weight, name, layer, module)
                found[kind] = None if inputs is None else inputs.movedim(dim, 0)
            else:
                piece = self.get(kind, name)
                found[kind] = None if piece is None else piece.movedim(dim, 0)
        return found

    def evidence(
        self,
        criterion: Criterion,
        weight: Tensor,
        *,
        name: str,
        layer: str,
        module: nn.Module,
        dim: int = 0,
        role: Literal["out", "in", "norm", "bias"] = "out",
        generator: torch.Generator | None = None,
    ) -> Evidence:
        """Return the evidence that ``criterion`` reads of one tensor, with the axis ``dim`` in front.

        For a layer that reads the channels, ``dim`` is its input axis. Arguments as in `pieces`.

        Raises:
            UnsupportedError: evidence is missing: the layer was not used, has no gradient, or its inputs cannot be
                read.
        """
        pieces = self.pieces(criterion.needs, weight, name=name, layer=layer, module=module, dim=dim)
        missing = [kind for kind, piece in pieces.items() if piece is None]
        if missing:
            raise UnsupportedError(
                f"`criterion={criterion!r}` on `{name}`: expected {', '.join(missing)} from {self.batches} batches, "
                f"found none: no batch reached it, it is frozen, or `{type(module).__name__}` has no input that can be "
                f"read. Exclude the layer: `targets=Targets(exclude={layer!r})`."
            )
        placed: dict[str, Any] = {
            kind: None if piece is None else piece.to(weight.device) for kind, piece in pieces.items()
        }
        return Evidence(weight.detach().movedim(dim, 0), role=role, generator=generator, **placed)


@validated
class EvidenceCollector:
    """Gather evidence of ``layers`` during a training run.

    A callback calls `begin_batch` in ``on_train_batch_start``, `observe_step` in ``on_before_optimizer_step`` (where
    gradients are accumulated, reduced over processes and unscaled, but not yet clipped), `end_batch` in
    ``on_train_batch_end``, `follow` in ``on_surgery`` and `remove` in ``teardown``. A layer that is called several
    times per batch counts each call; a shared parameter goes by its first name. Steps whose gradients are not finite,
    as the first of float16 training, are left out.

    Example:
        >>> net, storage = nn.Linear(2, 1), {}
        >>> collector = EvidenceCollector(net, None, frozenset({"inputs"}), storage)
        >>> collector.begin_batch()
        >>> _ = net(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        >>> collector.end_batch()
        >>> collector.means().get("inputs", "")
        tensor([5., 1.])
        >>> collector.remove()

    Args:
        model: the root of all names.
        layers: names of the modules to watch; None for all that have a parameter of their own. Gradients are those of
            the parameters inside them.
        needs: the kinds of evidence, of `KINDS`; ``"generator"`` is ignored.
        storage: the dict in which the evidence is kept, or a function that returns it. A callback gives a function,
            because loading a checkpoint replaces its state.
        accumulate: rule for ``"movement"``: (movement, weight, gradient) -> movement; `Movement.accumulate` by default.

    Raises:
        ValueError: a kind of evidence is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str] | None,
        needs: frozenset[str],
        storage: Storage | Callable[[], Storage],
        *,
        accumulate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        unknown = sorted(needs - KINDS - {"generator"})
        if unknown:
            raise ValueError(f"`EvidenceCollector(needs={unknown})`: expected some of {sorted(KINDS)}.")
        self._model = model
        self._layers = None if layers is None else list(layers)
        self._needs = needs
        self._storage = storage if callable(storage) else lambda: storage
        self._accumulate = accumulate or Movement().accumulate
        self._active = False
        self._pending: dict[tuple[str, str], list[Tensor]] = {}
        self._handles: list[Any] = []
        self._names: dict[Tensor, str] = {}
        self._watch()
        self._check_storage()

    def _check_storage(self) -> None:
        """Refuse evidence of a checkpoint that is not in the shape of its parameter."""
        storage, shapes = self._storage(), {name: parameter.shape for parameter, name in self._names.items()}
        for kind in PARAMETER_KINDS & storage.keys():
            for name, entry in storage[kind].items():
                total = entry if kind == "movement" else entry["total"]
                if total.shape != shapes.get(name, total.shape):
                    raise damage(
                        f"evidence[{kind!r}][{name!r}]", f"shape {tuple(shapes[name])}", f"{tuple(total.shape)}"
                    )

    @classmethod
    def for_criterion(
        cls,
        model: nn.Module,
        layers: Iterable[str] | None,
        criterion: Criterion,
        storage: Storage | Callable[[], Storage],
    ) -> EvidenceCollector:
        """Return a collector of what ``criterion`` needs, with its own rule for ``"movement"``."""
        accumulate = criterion.accumulate if isinstance(criterion, Movement) else None
        return cls(model, layers, criterion.needs, storage, accumulate=accumulate)

    @property
    def batches(self) -> int:
        """The number of batches that evidence has been gathered from since `forget`."""
        count: int = self._storage().get("batches", 0)
        return count

    def begin_batch(self, gather: bool = True) -> None:
        """Start a training batch; with ``gather`` its evidence counts. ``"movement"`` counts in any case."""
        self._active = gather
        self._pending.clear()

    def observe_step(self, parameters: Iterable[Tensor]) -> None:
        """Add the gradients of ``parameters``, those that the coming optimizer step changes."""
        mine = [p for p in parameters if p in self._names and p.grad is not None]
        kinds = self._needs & (PARAMETER_KINDS if self._active else {"movement"})
        if not mine or not kinds:
            return
        storage = self._storage()
        gradients = [full_precision(p.grad) for p in mine if p.grad is not None]
        finite = torch.stack([gradient.isfinite().all().to(gradients[0].device) for gradient in gradients]).all()
        for parameter, gradient in zip(mine, gradients, strict=True):
            name, counts = self._names[parameter], finite.to(gradient.device)
            sound = torch.where(counts, gradient, torch.zeros_like(gradient))
            if "movement" in kinds:
                entries = storage.setdefault("movement", {})
                before = entries.get(name, torch.zeros_like(gradient)).to(gradient.device)
                entries[name] = torch.where(counts, self._accumulate(before, parameter.detach(), sound), before)
            if "grad" in kinds:
                _add(storage, "grad", name, sound, counts)
            if "grad_squared" in kinds:
                _add(storage, "grad_squared", name, sound.square(), counts)

    def end_batch(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Finish a training batch: move what the hooks have seen into the storage, and count the batch.

        Done per batch, so that a checkpoint, which one process writes, holds what all processes have seen.

        Args:
            reduce: the mean over all processes, if there are several; all of them run the same layers.
        """
        if self._active:
            storage = self._storage()
            storage["batches"] = storage.get("batches", 0) + 1
            keys = sorted(self._pending)
            tensors = [tensor for key in keys for tensor in self._pending[key]]
            if reduce is not None:
                tensors = _reduced(tensors, reduce)
            for (kind, name), total, count in zip(keys, tensors[::2], tensors[1::2], strict=True):
                _add(storage, kind, name, total, count)
        self._active = False
        self._pending.clear()

    def means(self) -> Gathered:
        """Return the evidence gathered so far."""
        storage = self._storage()
        found: dict[str, dict[str, Tensor]] = {"movement": dict(storage.get("movement", {}))}
        for kind in sorted(KINDS - {"movement"}):
            for name, entry in storage.get(kind, {}).items():
                total, count = entry["total"], entry["count"].to(entry["total"].device)
                if bool(count > 0):
                    found.setdefault(kind, {})[name] = total.sqrt() if kind == "inputs" else total / count
        return Gathered(found, self.batches)

    def forget(self) -> None:
        """Drop the evidence, except ``"movement"``, which accumulates over the whole run."""
        storage = self._storage()
        for kind in (*KINDS - {"movement"}, "batches"):
            storage.pop(kind, None)
        self._pending.clear()

    def follow(self, kept: Mapping[str, Mapping[int, Tensor]] | None) -> None:
        """Follow a change of structure.

        After a cut, evidence of parameters is cut as they are. Evidence of layers cannot follow, because outputs and
        inputs are different ones now: with it everything but ``"movement"`` is dropped and gathered again. After a
        replacement of modules (``kept`` is None), so is everything, and the modules that there are now are watched;
        ``"movement"`` stays where parameter and shape have.
        """
        storage = self._storage()
        if kept is None or self._needs & LAYER_KINDS:
            self.forget()
        self._watch()
        shapes = {name: tensor.shape for tensor, name in self._names.items()}
        for kind in PARAMETER_KINDS & storage.keys():
            entries = storage[kind]
            for name in list(entries):
                dims = {dim: stays.long() for dim, stays in (kept or {}).get(name, {}).items()}
                entry = entries[name]
                total = take(entry if kind == "movement" else entry["total"], dims)
                if shapes.get(name) != total.shape:
                    del entries[name]
                else:
                    entries[name] = total if kind == "movement" else entry | {"total": total}

    def remove(self) -> None:
        """Remove all hooks; more than once does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pending.clear()
        self._active = False

    def _watch(self) -> None:
        """Name the parameters as they are now, and hook the modules that are there now."""
        self.remove()
        modules = dict(self._model.named_modules(remove_duplicate=False))
        names = self._layers
        if names is None:
            names = [n for n, m in self._model.named_modules() if any(True for _ in m.parameters(recurse=False))]
        watched = {name: modules[name] for name in names if name in modules}
        inside = {parameter for module in watched.values() for parameter in module.parameters()}
        self._names = {p: name for name, p in self._model.named_parameters() if p in inside}
        for name, module in watched.items():
            if "activation" in self._needs:
                self._handles.append(module.register_forward_hook(RunHook(self._output_hook(name))))
            if self._needs & LAYER_KINDS - {"activation"}:
                hook = self._input_hook(name)
                self._handles.append(module.register_forward_pre_hook(RunHook(hook), with_kwargs=True))

    def _output_hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if self._active and isinstance(output, Tensor) and output.dim() > 1:
                dim = -1 if isinstance(module, _CHANNELS_LAST) else 1
                channels = full_precision(output).abs().movedim(dim, 0).flatten(1)
                self._see("activation", name, channels.mean(dim=1), 1)

        return look

    def _input_hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._active:
                return
            for key, x in _inputs_of(name, module, args, kwargs):
                if "inputs" in self._needs and (dim := _input_dim(module)) is not None:
                    self._see("inputs", key, full_precision(x).square().movedim(dim, 0).flatten(1).sum(dim=1), 1)
                if self._needs & {"input_absolute", "input_covariance"} and not isinstance(module, _TRANSPOSED):
                    self._see_rows(key, input_rows(module, x))

        return look

    def _see_rows(self, name: str, rows: Tensor) -> None:
        if "input_absolute" in self._needs:
            self._see("input_absolute", name, rows.abs().sum(1).double(), rows.shape[1])
        if "input_covariance" in self._needs:
            self._see("input_covariance", name, (rows.mT @ rows).double(), rows.shape[1])

    def _see(self, kind: str, name: str, total: Tensor, count: int) -> None:
        new = [total, torch.tensor(float(count), dtype=total.dtype, device=total.device)]
        seen = self._pending.get((kind, name))
        self._pending[kind, name] = new if seen is None else [a + b for a, b in zip(seen, new, strict=True)]


@validated
def collect_evidence(
    model: nn.Module,
    data: Iterable[Any],
    needs: frozenset[str],
    *,
    batches: PositiveInt,
    loss: Loss | None = None,
    layers: Iterable[str] | None = None,
    accumulate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Gathered:
    """Gather evidence from the first ``batches`` of ``data``, without a Trainer.

    The model runs in evaluation mode and is left as it was, gradients included. Of a batch that is a tuple or list, the
    first item is the model's input; a mapping is its keyword arguments.

    Args:
        model: any module; of a LightningModule the ``training_step`` gives the loss where ``loss`` is None.
        data: batches.
        needs: the kinds of evidence, of `KINDS`.
        batches: how many batches to use.
        loss: (output, batch) -> scalar; wanted for gradients alone.
        layers: as in `EvidenceCollector`.
        accumulate: as in `EvidenceCollector`.

    Raises:
        ValueError: gradients are needed and there is no loss, or ``data`` is empty.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))]
        >>> sum_of_outputs = lambda output, batch: output.sum()
        >>> found = collect_evidence(net, data, frozenset({"grad"}), batches=1, loss=sum_of_outputs)
        >>> found.get("grad", "weight")
        tensor([[1., 2.]])
    """
    gradients = bool(needs & PARAMETER_KINDS)
    run = _training_step(model) if gradients and loss is None else None
    if gradients and loss is None and run is None:
        raise ValueError(
            f"`{type(model).__name__}` with a criterion that needs {sorted(needs & PARAMETER_KINDS)}: expected `loss`, "
            "a function (output, batch) -> scalar tensor, found None. Write for instance "
            "`loss=lambda output, batch: F.cross_entropy(output, batch[1])`."
        )
    storage: Storage = {}
    before = {parameter: parameter.grad for parameter in model.parameters()}
    with isolated(model), plain_attention(), torch.set_grad_enabled(gradients):
        collector = EvidenceCollector(model, layers, needs, storage, accumulate=accumulate)
        try:
            for index, batch in enumerate(islice(data, batches)):
                _clear_gradients(before)
                collector.begin_batch()
                value = _run_batch(model, batch, index, loss, run)
                if gradients and value is not None:
                    value.backward()  # type: ignore[no-untyped-call]
                    collector.observe_step(model.parameters())
                collector.end_batch()
        finally:
            collector.remove()
            for parameter, gradient in before.items():
                parameter.grad = gradient
    if not collector.batches:
        raise ValueError(
            f"`{type(model).__name__}` with `data=...`: expected at least one batch, found none. An iterator that has "
            "been used up is empty: give a list or a DataLoader."
        )
    return collector.means()


def example_of_batch(batch: Any, model: nn.Module) -> ExampleInput:
    """Return the call of ``model`` for a batch: a mapping is keyword arguments; of a tuple or list the first item."""
    if isinstance(batch, ExampleInput):
        return batch.to(model)
    if isinstance(batch, Mapping):
        return ExampleInput(kwargs=dict(batch)).to(model)
    return ExampleInput((batch[0] if isinstance(batch, (list, tuple)) else batch,)).to(model)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return the input of a layer as ``(groups, positions, in)``: for a convolution every patch that it reads.

    >>> input_rows(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[[1., 2.],
             [2., 3.]]])
    """
    x = full_precision(x)
    layer: Any = module
    if not isinstance(module, _CONVOLUTION):
        return x.reshape(1, -1, x.shape[-1])
    dims = len(layer.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for dim in range(dims):
        size, stride, dilation = layer.kernel_size[dim], layer.stride[dim], layer.dilation[dim]
        x = x.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    patches = x.movedim(1, 1 + dims).flatten(0, dims)  # (positions, in, *kernel)
    return patches.reshape(len(patches), layer.groups, -1).transpose(0, 1)


def _add(storage: Storage, kind: str, name: str, total: Tensor, count: Tensor) -> None:
    entry = storage.setdefault(kind, {}).get(name)
    count = count.to(total.dtype)
    if entry is not None:
        if entry["total"].shape != total.shape:
            raise damage(
                f"evidence[{kind!r}][{name!r}]", f"shape {tuple(total.shape)}", f"{tuple(entry['total'].shape)}"
            )
        total, count = entry["total"].to(total.device) + total, entry["count"].to(total.device) + count
    storage[kind][name] = {"total": total, "count": count}


def _reduced(tensors: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Reduce all tensors of one type at once: one collective operation, not one per layer."""
    reduced = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = reduce(torch.cat([tensors[place].reshape(-1) for place in places]))
        parts = torch.split(flat, [tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            reduced[place] = part.reshape(tensors[place].shape).clone()
    return reduced


def _inputs_of(name: str, module: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    """Key -> input of the module, where the module multiplies its weight with that input."""
    if isinstance(module, nn.MultiheadAttention):
        given = dict(zip(_ATTENTION_INPUTS, args, strict=False)) | kwargs
        return [(f"{name}:{key}", given[key].detach()) for key in _ATTENTION_INPUTS]
    if not isinstance(module, (nn.Linear, *_CONVOLUTION, *_TRANSPOSED)):
        return []
    x = next(tensors_in((args, kwargs)), None)
    return [] if x is None else [(name, x.detach())]


def _input_dim(module: nn.Module) -> int | None:
    """Which dimension of its input counts the channels that a layer reads."""
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
        return -1
    return -1 - len(module.kernel_size) if isinstance(module, (*_CONVOLUTION, *_TRANSPOSED)) else None


def _inputs_like(
    inputs: Mapping[str, Tensor], weight: Tensor, name: str, layer: str, module: nn.Module
) -> Tensor | None:
    """The norms of the inputs in a shape that broadcasts to ``weight`` in its own layout."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention_inputs(inputs, name.rpartition(".")[2], layer, weight)
    norms = inputs.get(layer)
    if norms is None or weight.ndim < 2:
        return None
    kernel = [1] * (weight.ndim - 2)
    if isinstance(module, _TRANSPOSED):
        return norms.reshape(-1, 1, *kernel)
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return norms.reshape(1, -1, *kernel)
    outputs = weight.shape[0] // groups
    return norms.reshape(groups, -1).repeat_interleave(outputs, dim=0).reshape(groups * outputs, -1, *kernel)


def _attention_inputs(inputs: Mapping[str, Tensor], own: str, layer: str, weight: Tensor) -> Tensor | None:
    """The same for a projection inside an attention; what the output projection reads is not known."""
    parts = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
    if own in parts:
        norms = inputs.get(f"{layer}:{parts[own]}")
        return None if norms is None else norms.reshape(1, -1)
    found = [inputs.get(f"{layer}:{key}") for key in _ATTENTION_INPUTS]
    if own != "in_proj_weight" or any(norms is None for norms in found):
        return None
    rows = weight.shape[0] // len(found)
    return torch.cat([norms.reshape(1, -1).expand(rows, -1) for norms in found if norms is not None])


def _training_step(model: nn.Module) -> Callable[..., Any] | None:
    """The LightningModule's own step, if it can run without a Trainer."""
    step: Callable[..., Any] | None = getattr(model, "training_step", None)
    return step if step is not None and getattr(model, "automatic_optimization", True) else None


def _run_batch(
    model: nn.Module, batch: Any, index: int, loss: Loss | None, step: Callable[..., Any] | None
) -> Tensor | None:
    """Run one batch and return its loss, or None where no loss is wanted or the step gave none."""
    if step is not None:
        return _run_step(step, _to_device(batch, model), index)
    example = example_of_batch(batch, model)
    output = model(*example.args, **example.kwargs)
    return None if loss is None else loss(output, _to_device(batch, model))


def _run_step(step: Callable[..., Any], batch: Any, index: int) -> Tensor | None:
    """Run a ``training_step`` as if it logged nothing; inside `isolated`, which puts its attributes back."""
    attributes: dict[str, Any] = vars(getattr(step, "__self__"))  # noqa: B009
    attributes["log"] = attributes["log_dict"] = lambda *args, **kwargs: None
    output = step(batch, index)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _to_device(batch: Any, model: nn.Module) -> Any:
    """Move the tensors of a batch to the model's device; their types stay."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return batch
    return tree_map_only(Tensor, lambda tensor: tensor.to(parameter.device), batch)


def _clear_gradients(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
