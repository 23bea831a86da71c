"""Gather the evidence that criteria and fits read: from the batches of a training run, or from data at hand.

One `EvidenceCollector` serves every method. What it has gathered lies in a plain dict of the method's state, so that it
is in checkpoints and a run that was interrupted while gathering continues bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.criteria.evidence import Criterion, full_precision
from lightning_light.criteria.gathered import ATTENTION_INPUTS, KINDS, LAYER_KINDS, PARAMETER_KINDS, Gathered, Storage
from lightning_light.criteria.gradient import Movement
from lightning_light.host.patches import RunHook
from lightning_light.nested import tensors_in
from lightning_light.schema import damage
from lightning_light.surgery.edit import take
from lightning_light.validation import validated

__all__ = ["EvidenceCollector", "input_rows"]

_Convolution, _Transposed = nn.modules.conv._ConvNd, nn.modules.conv._ConvTransposeNd  # a transposed one is both
_EAGER, _EAGER_FOR = ExitStack(), set[int]()  # of the process, as the stance is; which collectors want it
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


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
        needs: the kinds of evidence, see `Criterion`; ``"generator"`` is ignored.
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
        self._hooks = ExitStack()
        self._names: dict[Tensor, str] = {}
        self._watch()
        self._check_storage()

    def _check_storage(self) -> None:
        """Refuse evidence of a checkpoint that is not in the shape of its parameter."""
        storage, parameters = self._storage(), {name: parameter for parameter, name in self._names.items()}
        for kind in PARAMETER_KINDS & storage.keys():
            for name, entry in storage[kind].items():
                total = entry if kind == "movement" else entry["total"]
                shape = parameters.get(name, total).shape
                if total.shape != shape:
                    raise damage(f"evidence[{kind!r}][{name!r}]", f"shape {tuple(shape)}", f"{tuple(total.shape)}")

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
        return int(self._storage().get("batches", 0))

    def begin_batch(self, gather: bool = True) -> None:
        """Start a training batch; with ``gather`` its evidence counts. ``"movement"`` counts in any case."""
        self._active = gather
        self._pending.clear()
        self._run_eagerly(gather and bool(self._needs & LAYER_KINDS) and "torch._dynamo" in sys.modules)

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
        self._run_eagerly(False)

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
        self._hooks.close()
        self._run_eagerly(False)
        self._pending.clear()
        self._active = False

    def _run_eagerly(self, wanted: bool) -> None:
        """Run compiled code uncompiled as long as one collector wants it: it ignores hooks that were added later."""
        if wanted and not _EAGER_FOR:
            _EAGER.enter_context(torch.compiler.set_stance("force_eager"))
        (_EAGER_FOR.add if wanted else _EAGER_FOR.discard)(id(self))
        if not _EAGER_FOR:
            _EAGER.close()

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
                output_hook = RunHook(partial(self._see_output, name))
                self._hooks.enter_context(module.register_forward_hook(output_hook))
            if self._needs & LAYER_KINDS - {"activation"}:
                hook = RunHook(partial(self._see_inputs, name))
                self._hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _see_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._active and isinstance(output, Tensor) and output.dim() > 1:
            dim = -1 if isinstance(module, _CHANNELS_LAST) else 1
            channels = full_precision(output).abs().movedim(dim, 0).flatten(1)
            self._see("activation", name, channels.mean(dim=1), 1)

    def _see_inputs(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        for key, x in _inputs_of(name, module, args, kwargs) if self._active else ():
            if "inputs" in self._needs and (dim := _input_dim(module)) is not None:
                self._see("inputs", key, full_precision(x).square().movedim(dim, 0).flatten(1).sum(dim=1), 1)
            if self._needs & {"input_absolute", "input_covariance"} and not isinstance(module, _Transposed):
                rows = input_rows(module, x)
                if "input_absolute" in self._needs:
                    self._see("input_absolute", key, rows.abs().sum(1).double(), rows.shape[1])
                if "input_covariance" in self._needs:
                    self._see("input_covariance", key, (rows.mT @ rows).double(), rows.shape[1])

    def _see(self, kind: str, name: str, total: Tensor, count: int) -> None:
        new = [total, torch.tensor(float(count), dtype=total.dtype, device=total.device)]
        seen = self._pending.get((kind, name))
        self._pending[kind, name] = new if seen is None else [a + b for a, b in zip(seen, new, strict=True)]


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return the input of a layer as ``(groups, positions, in)``: for a convolution every patch that it reads.

    >>> input_rows(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[[1., 2.],
             [2., 3.]]])
    """
    x = full_precision(x)
    layer: Any = module
    if not isinstance(module, _Convolution):
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
        given = dict(zip(ATTENTION_INPUTS, args, strict=False)) | kwargs
        return [(f"{name}:{key}", given[key].detach()) for key in ATTENTION_INPUTS]
    if not isinstance(module, nn.Linear | _Convolution):
        return []
    x = next(tensors_in((args, kwargs)), None)
    return [] if x is None else [(name, x.detach())]


def _input_dim(module: nn.Module) -> int | None:
    """Which dimension of its input counts the channels that a layer reads."""
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
        return -1
    return -1 - len(module.kernel_size) if isinstance(module, _Convolution) else None
