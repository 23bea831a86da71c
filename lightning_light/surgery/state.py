"""Keep the compression state of a module: its structural edits, and the state and the layers of every method."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_light.errors import ManifestError, SurgeryError, UnsupportedError
from lightning_light.schema import Context, damage
from lightning_light.surgery.attributes import implied_attributes
from lightning_light.surgery.data import set_data
from lightning_light.surgery.manifest import (
    KEY,
    Entry,
    Kept,
    Manifest,
    check_fingerprint,
    check_states,
    fingerprint_of,
    half_size,
)
from lightning_light.surgery.masks import drop_false_masks
from lightning_light.surgery.operations import is_registered, replay_edits
from lightning_light.surgery.optimizer import elementwise_state, order_parameters, orphans, parameter_order, unwrap
from lightning_light.surgery.ownership import Claim, all_names, refuse_owned
from lightning_light.surgery.structure import PRIVATE_PREFIX, Difference, apply_structure, compare, copy_structure


class CompressionState:
    """Hold the structural history of one module, and what methods keep about it.

    Attributes:
        edit_log: the operations, in order; consecutive ``channels`` entries are one.
        state: method name -> what it keeps, in plain types and tensors.
        claims: method name -> the layers that it works on.
        references: quantity -> its value before any method changed the network.
        kept: tensor name -> dimension -> positions of the first network that are left; None when unknown.
        resumed: whether the current ``fit`` goes on from a checkpoint.
        active: objects that act on the module now, such as a fake quantizer; never in a checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self.edit_log: list[Entry] = []
        self.state: dict[str, dict[str, Any]] = {}
        self.claims: dict[str, Claim] = {}
        self.references: dict[str, float] = {}
        self.kept: Kept | None = {}
        self.resumed = False
        self.active: list[object] = []
        self._order: list[list[list[str | None]]] = []
        self._group_sizes: list[list[int]] = []
        self._original = copy_structure(model)

    def record(self, entry: Mapping[str, Any], *, kept: Mapping[str, Mapping[int, Tensor]] | None = None) -> None:
        """Record an operation that has just been applied to the module.

        Args:
            entry: plain types; ``op`` is the name of a registered operation.
            kept: for ``channels``: tensor name -> dimension -> positions that stayed. Without it the checkpoint
                cannot be expanded to the first network.

        Raises:
            ValueError: the operation is unknown, or the entry is not plain: it could not be loaded.
        """
        if not is_registered(str(entry.get("op"))):
            raise ValueError(f"`record({dict(entry)})`: expected the name of a registered operation under 'op'.")
        plain: Entry = json.loads(json.dumps(entry))
        if plain["op"] == "channels":
            self._keep(kept)
        if plain["op"] == "channels" and self.edit_log and self.edit_log[-1]["op"] == "channels":
            for path, values in plain["attributes"].items():
                self.edit_log[-1]["attributes"].setdefault(path, {}).update(values)
        else:
            self.edit_log.append(plain)

    def claim(
        self, model: nn.Module, method: str, stage: int, layers: Iterable[str], *, follows_cuts: bool = False
    ) -> None:
        """Claim ``layers`` for ``method``, instead of those it has claimed before.

        A method claims when it changes layers, not before: until then an earlier method may still change them.

        Args:
            model: the module that the state belongs to.
            method: key of the method's state.
            stage: of `lightning_light.order.Stage`.
            layers: names of modules; what lies inside them is claimed as well.
            follows_cuts: as in `Claim`.

        Raises:
            UnsupportedError: a later method owns one of the layers and does not follow a change of it.
        """
        claim = Claim(method, int(stage), tuple(dict.fromkeys(layers)), follows_cuts)
        if claim != self.claims.get(method):
            refuse_owned(self.claims.values(), all_names(model, claim.layers), method=method, stage=stage)
            self.claims[method] = claim

    def disclaim(self, method: str) -> None:
        """Give up the claim of ``method``, if it has one."""
        self.claims.pop(method, None)

    def owners(self, model: nn.Module, layer: str) -> list[Claim]:
        """Return the claims on the layer called ``layer``, under any of its names, earliest stage first."""
        names = all_names(model, [layer])
        found = [claim for claim in self.claims.values() if any(map(claim.covers, names))]
        return sorted(found, key=lambda claim: claim.stage)

    def reference(self, quantity: str, measure: Callable[[], float], *, scope: str = "") -> float:
        """Return the value of a budget's quantity before any method changed the network.

        Measured once per quantity, stored in checkpoints, and shared by all methods: two budgets of 70 % and 50 % end
        at 50 %. Every method calls it before it changes anything, so that the value is the uncompressed network's.

        Args:
            quantity: the ``quantity`` of a `Budget`.
            measure: measures it now; called only if it is not known yet.
            scope: what the value depends on besides the network, for instance the targets whose channels count.
        """
        key = f"{quantity}:{scope}" if scope else quantity
        if key not in self.references:
            self.references[key] = float(measure())
        return self.references[key]

    def averaged_copy(self) -> CompressionState:
        """Return the same history for an averaged copy of the module; later changes of one are not in the other."""
        copied = CompressionState.__new__(CompressionState)
        copied.__dict__.update(vars(self), claims=dict(self.claims), references=dict(self.references), active=[])
        copied.edit_log, copied.state = copy.deepcopy(self.edit_log), copy.deepcopy(self.state)
        copied.kept = None if self.kept is None else {name: dict(dims) for name, dims in self.kept.items()}
        return copied

    def manifest(self, model: nn.Module, optimizers: Iterable[Any] = ()) -> dict[str, Any]:
        """Return what a checkpoint of ``model`` holds under the key ``lightning_light``."""
        self._remember(model)
        for method in drop_false_masks(model, self.state):
            self.disclaim(method)
        first = dict(self._original.named_buffers())
        changed = {
            name: buffer
            for name, buffer in model.named_buffers()
            if name in first and first[name].device.type != "meta" and first[name].shape != buffer.shape
        }
        return Manifest(
            edit_log=self.edit_log,
            state=self.state,
            owners=self.claims,
            references=self.references,
            parameter_order=parameter_order(optimizers, model),
            fingerprint=fingerprint_of(self._original, PRIVATE_PREFIX),
            buffers=changed,
            kept=self.kept,
        ).encode()

    def load(self, model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Bring ``model`` to the structure of ``checkpoint``, forwards or backwards; the weights are loaded later.

        Where the structure is the same already nothing is touched, so live optimizers keep their parameters.

        Raises:
            ManifestError: the manifest is damaged, or of another network. The model is untouched.
        """
        self._remember(model)
        plain = Manifest(fingerprint=fingerprint_of(self._original, PRIVATE_PREFIX))  # written without this package
        manifest = Manifest.decode(checkpoint[KEY]) if KEY in checkpoint else plain
        state_dict: Mapping[str, Any] = checkpoint.get("state_dict", {})
        _check_order(manifest.parameter_order, checkpoint.get("optimizer_states", []), state_dict)
        if manifest.edit_log or self.edit_log:
            check_fingerprint(self._original, manifest.fingerprint, PRIVATE_PREFIX)
        if not manifest.edit_log:
            _check_unedited(manifest.fingerprint, state_dict)
        if manifest.edit_log != self.edit_log or (self.edit_log and other_shapes(model, state_dict)):
            current, target = self._structures(manifest, state_dict)
            check_states(manifest.state, Context.of(target, state_dict))
            apply_structure(model, current, target)
        else:
            check_states(manifest.state, Context.of(model, state_dict))
        self.edit_log, self.state, self.kept = manifest.edit_log, copy.deepcopy(manifest.state), manifest.kept
        self.claims, self.references = manifest.owners, manifest.references
        self._order = manifest.parameter_order
        self._group_sizes = [list(map(len, groups)) for groups in self._order]

    def refuse_other_structure(self, model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose structure the ``model`` would have to take: shards of parameters cannot follow.

        Raises:
            ManifestError: the manifest is damaged.
            UnsupportedError: the checkpoint has other edits than ``model``.
        """
        found = Manifest.decode(checkpoint[KEY]).edit_log if KEY in checkpoint else []
        if found != self.edit_log:
            raise UnsupportedError(
                f"A checkpoint of a compressed network, and a `{type(model).__name__}` of another structure whose "
                "parameters are sharded: expected a module that has the structure already. Build it by "
                "`lightning_light.load_from_checkpoint(...)`, and pass that to `trainer.fit(..., ckpt_path=...)`."
            )

    def follow(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Bring ``model`` to the shapes of a bare ``state_dict``, if those are its own, cut smaller.

        Anything else is left as it is, for ``load_state_dict`` to report.
        """
        self._remember(model)
        changed = other_shapes(model, state_dict, prefix)
        if not changed or any(f"{prefix}{name}" not in state_dict for name in _tensors(model)):
            return
        first = {f"{prefix}{name}": tensor for name, tensor in _tensors(self._original).items()}
        if not all(_fits_into(state_dict[name], first.get(name)) for name in changed):
            return
        target, shapes = copy_structure(model), {name: state_dict[name] for name in changed}
        _take_shapes(target, shapes, prefix)
        current = copy_structure(model)
        if not all(map(_go_together, current.modules(), target.modules())):
            return
        _imply_attributes(target)
        attributes = compare(current, target).attributes
        apply_structure(model, current, target)
        self.record({"op": "channels", "attributes": attributes})

    def reconcile(self, optimizers: list[Any], model: nn.Module, *, resuming: bool) -> int:
        """Give ``optimizers`` the parameters that the checkpoint's optimizers had, by name, at the same places.

        Needed where the order depends on names or on modules that have been replaced, and where the optimizers were
        built before the Trainer and hold parameters that are no longer the module's. Their state, stored by
        position, is loaded later.

        Args:
            optimizers: those of this run, in ``on_fit_start``.
            model: the live module.
            resuming: whether the Trainer is about to load their state.

        Returns:
            The number of entries that were replaced.

        Raises:
            ManifestError: the checkpoint's optimizers own a parameter that the module does not have.
        """
        self._remember(model)
        order, self._order, self.resumed = self._order, [], resuming
        if not order or not (resuming or orphans(optimizers, model)):
            return 0
        try:
            return order_parameters(optimizers, model, order)
        except SurgeryError as error:
            raise ManifestError(str(error)) from error

    def require_parameters(self, optimizers: Sequence[Any]) -> None:
        """Refuse to load the checkpoint's optimizers into groups that have fewer parameters.

        Raises:
            ManifestError: a callback that added parameters, such as learned scales, is missing, or its state is.
        """
        expected, self._group_sizes = self._group_sizes, []
        live = [[len(group["params"]) for group in unwrap(optimizer).param_groups] for optimizer in optimizers]
        if list(map(len, live)) == list(map(len, expected)) and sum(map(sum, live)) < sum(map(sum, expected)):
            raise ManifestError(
                f"The checkpoint's optimizers have groups of {expected} parameters, those of this run of {live}: "
                "expected what the callbacks of its run have added, learned scales or projectors. Give the Trainer "
                "the same callbacks; if it has them, the checkpoint is damaged."
            )

    def _remember(self, model: nn.Module) -> None:
        """Take the present structure as the original one, as long as nothing has been changed."""
        if not self.edit_log:
            self._original = copy_structure(model)

    def _keep(self, kept: Mapping[str, Mapping[int, Tensor]] | None) -> None:
        if kept is None or self.kept is None:
            self.kept = None
            return
        for name, dims in kept.items():
            before = self.kept.setdefault(name, {})
            for dim, positions in dims.items():
                new = half_size(positions)
                before[dim] = before[dim][new.long()] if dim in before else new

    def _structures(self, manifest: Manifest, state_dict: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
        """Return the present structure, and that of the checkpoint."""
        current = replay_edits(copy_structure(self._original), self.edit_log)
        target = replay_edits(copy_structure(self._original), manifest.edit_log)
        difference = compare(current, target)
        _check_complete(target, state_dict, difference)
        _take_shapes(target, state_dict, "")
        _take_buffers(target, manifest.buffers)
        _check_attributes(target, {path for entry in manifest.edit_log for path in entry.get("attributes", {})})
        return current, target


def _check_order(
    order: list[list[list[str | None]]], optimizer_states: Sequence[Any], state_dict: Mapping[str, Any]
) -> None:
    """Check that every parameter of the checkpoint's optimizers has a name, at its place, whose shape fits."""
    for number, (groups, state) in enumerate(zip(order, optimizer_states, strict=False)):
        sizes = [len(group["params"]) for group in state.get("param_groups", [])]
        if sizes and [len(group) for group in groups] != sizes:
            found = [len(group) for group in groups]
            raise damage(
                f"manifest['parameter_order'][{number}]", f"names for groups of {sizes} parameters", f"{found}"
            )
        places = [place for group in state.get("param_groups", []) for place in group["params"]]
        for place, name in zip(places, itertools.chain.from_iterable(groups), strict=False):
            moments = elementwise_state(state.get("state", {}).get(place, {}))
            shapes = {tuple(moment.shape) for moment in moments}
            parameter = state_dict.get(name) if name is not None else None
            if isinstance(parameter, Tensor) and shapes - {tuple(parameter.shape)}:
                raise damage(
                    f"manifest['parameter_order'][{number}]",
                    f"a parameter with moments of shape {tuple(parameter.shape)} in the place of {name!r}",
                    f"one with {sorted(shapes)}",
                )


def other_shapes(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of tensors whose shapes differ, under the names of ``state_dict``."""
    live = {f"{prefix}{name}": tensor for name, tensor in _tensors(model).items()}
    return [
        name
        for name, tensor in live.items()
        if isinstance(state_dict.get(name), Tensor) and tensor.shape != state_dict[name].shape
    ]


def _fits_into(small: Tensor, large: Tensor | None) -> bool:
    if large is None or small.ndim != large.ndim:
        return False
    return all(new <= old for new, old in zip(small.shape, large.shape, strict=True))


def _go_together(before: nn.Module, after: nn.Module) -> bool:
    """Whether the vectors of one layer that had the same length still do: a norm's weight, bias and statistics."""
    lengths: dict[int, set[int]] = {}
    for kind in ("_parameters", "_buffers"):
        for name, old in getattr(before, kind).items():
            if old is not None and not is_lazy(old) and old.ndim == 1:
                lengths.setdefault(len(old), set()).add(len(getattr(after, kind)[name]))
    return all(len(new) == 1 for new in lengths.values())


def _tensors(structure: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers under all their names; not those that have no shape yet."""
    return {
        name: tensor
        for path, module in structure.named_modules(remove_duplicate=False)
        for kind in (module._parameters, module._buffers)
        for own, tensor in kind.items()
        if tensor is not None and own not in module._non_persistent_buffers_set and not is_lazy(tensor)
        if not (name := f"{path}.{own}" if path else own).startswith(PRIVATE_PREFIX)
    }


def _replaced(names: Iterable[str], state_dict: Mapping[str, Any]) -> list[str]:
    """Return the ``names`` in whose place ``state_dict`` has other tensors of the same layer."""
    names = set(names)
    others = {key.rpartition(".")[0] for key in state_dict if key not in names}
    layers = {layer[:end] for layer in others for end in (*_dots(layer), len(layer))}
    return sorted(name for name in names if name not in state_dict and name.rpartition(".")[0] in layers - {""})


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _check_unedited(fingerprint: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Any]) -> None:
    """Check that a checkpoint without edits has the parameters of the network before the first one."""
    wrong = _replaced(fingerprint, state_dict)
    for name, shape in fingerprint.items():
        found = state_dict.get(name)
        if isinstance(found, Tensor) and tuple(found.shape) != shape:
            wrong.append(name)
    if wrong:
        raise damage("manifest['edit_log']", f"the edits after which `state_dict` has its {wrong[0]!r}", "none")


def _check_complete(target: nn.Module, state_dict: Mapping[str, Any], difference: Difference) -> None:
    """Check that the checkpoint has the tensors of every layer that an operation has changed, and no others."""
    tensors = _tensors(target)
    missing = [name for name in tensors if name not in state_dict and difference.concerns(name.rpartition(".")[0])]
    missing += _replaced(tensors, state_dict)
    replaced = tuple(f"{name}." for name in difference.replaced if name)
    surplus = [name for name in state_dict if name.startswith(replaced) and name not in tensors]
    surplus = [name for name in surplus if not name.endswith("_extra_state")]
    wrong = [
        name
        for name, tensor in tensors.items()
        if isinstance(state_dict.get(name), Tensor) and state_dict[name].ndim != tensor.ndim
    ]
    if missing or wrong or surplus:
        found = f"without {missing[:3]}" if missing else f"with another number of dimensions in {wrong[:3]}"
        found = found if missing or wrong else f"with {surplus[:3]} as well"
        raise ManifestError(
            f"The checkpoint's edit log changes layers of `{type(target).__name__}` whose tensors its `state_dict` "
            f"does not match: found one {found}. It is damaged, or tensors were taken out of it."
        )


def _take_shapes(structure: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    for name, tensor in _tensors(structure).items():
        wanted = state_dict.get(f"{prefix}{name}")
        if isinstance(wanted, Tensor) and wanted.shape != tensor.shape:
            set_data(tensor, torch.empty(wanted.shape, dtype=tensor.dtype, device="meta"))


def _take_buffers(structure: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for path, module in structure.named_modules():
        for name in module._non_persistent_buffers_set:
            value = buffers.get(f"{path}.{name}" if path else name)
            if value is not None:
                module._buffers[name] = value


def _imply_attributes(structure: nn.Module) -> None:
    for module in structure.modules():
        for name, value in implied_attributes(module).items():
            if getattr(module, name) != value:
                setattr(module, name, value)


def _check_attributes(structure: nn.Module, paths: set[str]) -> None:
    """Check that the edit log and the shapes of the state dict agree."""
    for path, module in structure.named_modules():
        if path not in paths or any(map(is_lazy, module.parameters(recurse=False))):
            continue
        implied = implied_attributes(module)
        different = {name: (getattr(module, name), v) for name, v in implied.items() if getattr(module, name) != v}
        if different:
            raise ManifestError(
                f"The checkpoint contradicts itself at `{path}` (attribute: edit_log, tensors): {different}. It is "
                "damaged, or its tensors are of another step than its manifest."
            )
