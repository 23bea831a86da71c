"""Run a model without some channels, and find every call that does not give what it has to, in one pass.

What each call of a recorded pass gives without the channels is known beforehand. A call that raises an error, or gives
another shape or other channels, is a break: its inputs were right, so the cause is the call itself. Its result is
replaced by a tensor that is right, and the pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_light.dependency.alignment import channel_orders, paired_steps
from lightning_light.dependency.labels import FIXED, LabelUnion, varying
from lightning_light.dependency.placeholders import PRODUCT_FUNCTIONS, Placeholders, ValueNeededError
from lightning_light.dependency.recording import (
    METADATA,
    SET_DATA,
    Call,
    Expectation,
    ModuleResult,
    Recorded,
    Recording,
    function_name,
    rebuilt,
    seed_for,
    tensors_of,
    wrap_forwards,
)
from lightning_light.dependency.trace import Tracer, running
from lightning_light.errors import TraceError
from lightning_light.isolation import FORWARD_ERRORS
from lightning_light.module_stack import ModuleStack
from lightning_light.nested import tensors_in

__all__ = ["Break", "OtherPathError", "Rehearsal"]

_ACTIVATIONS = {"relu", "relu_", "relu6", "gelu", "silu", "elu", "leaky_relu", "sigmoid", "sigmoid_", "tanh", "tanh_"}
_MORE_ACTIVATIONS = {"hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "mish", "softplus", "softmax"}
_SUMS = {"add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "div_", "neg", "mean", "sum"}
_POWERS = {"pow", "square", "sqrt", "rsqrt", "exp", "log", "log_softmax", "erf", "sin", "cos", "abs", "reciprocal"}
_LAYOUTS = {
    "permute",
    "transpose",
    "t",
    "flatten",
    "unsqueeze",
    "contiguous",
    "clone",
    "detach",
    "float",
    "to",
    "type_as",
}
_POOLING = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "interpolate"}
_LAYERS = {"batch_norm", "layer_norm", "rms_norm", "normalize", "embedding", "dropout", "dropout2d", "feature_dropout"}
_FREE_OF_COUNTS = (
    PRODUCT_FUNCTIONS | _ACTIVATIONS | _MORE_ACTIVATIONS | _SUMS | _POWERS | _LAYOUTS | _POOLING | _LAYERS
) | {"clamp", "masked_fill", "masked_fill_"}
"""Functions without an argument that counts channels: on the right inputs they give the right result, or raise."""


Kind: TypeAlias = Literal["call", "module", "path"]


class OtherPathError(Exception):
    """The pass calls other functions than the recorded one, so nothing is known of their results."""


@dataclass(frozen=True, eq=False)
class Break:
    """A place that does not work, or may not, without the removed channels.

    Attributes:
        position: of the call in the recording.
        error: what went wrong.
        labels: of the removed channels that the call handles.
        kind: ``"call"``: a torch function fails; ``"module"``: its module raises an error before this call, outside of
            all torch functions; ``"path"``: its module calls another function here, which may be right. In the latter
            two, ``labels`` are those of all calls of the module so far.
    """

    position: int
    error: str
    labels: Tensor
    kind: Kind = "call"


class _FixedUnion(LabelUnion):
    """Labels of a finished trace: those that were known at the start may not be merged.

    Attributes:
        merged: known labels that a rule tried to merge.
    """

    def __init__(self, count: int) -> None:
        super().__init__(torch.arange(count))
        self.merged: list[Tensor] = []
        self._known = count

    @override
    def roots(self, labels: Tensor) -> Tensor:
        return labels if self.parent.numel() == self._known else super().roots(labels)

    @override
    def protect(self, labels: Tensor, reason: str) -> None:
        """Ignore it: the first trace has protected what has to be."""

    @override
    def merge(self, left: Tensor, right: Tensor, reason: str = "") -> None:
        if left.shape == right.shape and torch.equal(left, right):
            return
        left, right = torch.broadcast_tensors(left, right)  # type: ignore[no-untyped-call]  # torch's own signature
        left, right = self.roots(left.reshape(-1)), self.roots(right.reshape(-1))
        unequal = (left != right) & (left != FIXED) & (right != FIXED)
        known = unequal & (left < self._known) & (right < self._known)
        if known.any():
            self.merged += [left[known], right[known]]
        super().merge(left[unequal & ~known], right[unequal & ~known])


class _TrialTracer(Tracer):  # type: ignore[no-untyped-call]  # torch's own signature
    """Run the rules for a call; notes for the graph were made by the first trace."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modules = ModuleStack()

    @override
    def note_attribute(self, attribute: str, labels: Tensor | None) -> None: ...

    @override
    def note_split(self, label: Tensor, dims: Sequence[int]) -> None: ...


class Rehearsal(TorchFunctionMode):
    """One pass of a model that has lost channels, compared with a recording call by call.

    Args:
        recording: the pass with all channels.
        removed: labels of the channels that the model has lost.
        skip_products: do not compute products, see `Placeholders`.
        compare_order: compare the order of channels; not where a single one of a group is left, which has no order.

    Attributes:
        expected: what the calls have to give.
        breaks: what does not work, in the order of the pass.
    """

    def __init__(self, recording: Recording, removed: Tensor, *, skip_products: bool, compare_order: bool) -> None:
        super().__init__()
        self.breaks: list[Break] = []
        self.expected = Expectation(recording, removed)
        self._recording, self._compare_order = recording, compare_order
        self._union = _FixedUnion(self.expected.removed.numel())
        self._tracer = _TrialTracer(heads=recording.trace.heads, union=self._union, skip_products=skip_products)
        self._position = 0

    def run(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], changed: Iterable[str]
    ) -> list[Break]:
        """Run ``model`` and return `breaks`.

        Args:
            model: without the removed channels.
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            changed: names of the tensors that have lost channels, and do not have their values.

        Raises:
            OtherPathError: the pass calls other functions; `breaks` has those before that.
            TraceError: an error outside of all torch functions.
            ValueNeededError: a value is read that was not computed.
        """
        try:
            with running(model), self._tracer.modules.watching(model):
                tensors = dict([*model.named_parameters(), *model.named_buffers()])
                if self._tracer.skip_products:
                    self._placeholders.add(tensors[name] for name in changed)
                wrap_forwards(model, self._run_forward)
                with self:
                    out = model(*args, **kwargs)
        except FORWARD_ERRORS as error:
            raise TraceError(str(error)) from error
        shapes = [tuple(tensor.shape) for tensor in tensors_in(out, objects=True)]
        if self._position != len(self._recording.calls) or shapes != self._recording.trace.output_shapes:
            raise OtherPathError("output")
        return self.breaks

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and replace its result if it is not the one expected."""
        kwargs = kwargs or {}
        if function in METADATA:
            return function(*args, **kwargs)
        inputs = tensors_of((args, kwargs))
        self._placeholders.check_read(function_name(function), inputs)
        calls = self._recording.calls
        call = calls[self._position] if self._position < len(calls) else None
        if call is None or call.function != function:
            return self._unrecorded(function, args, kwargs)
        seed_for(function, self._position)
        self._position += 1
        if len(inputs) != len(call.inputs):
            error = f"`{call.name}` would read {len(inputs)} tensors instead of {len(call.inputs)}"
            return self._replaced(call, error, inputs)
        try:
            out, difference, labels = self._compared(call, args, kwargs, inputs)
        except FORWARD_ERRORS as raised:
            return self._replaced(call, str(raised).partition("\n")[0], inputs)
        if difference is not None:
            return self._replaced(call, difference, inputs, labels)
        if self._placeholders.among(inputs):
            self._placeholders.add(tensors_of(out))
        return out

    @property
    def _placeholders(self) -> Placeholders:
        return self._tracer.placeholders

    def _unrecorded(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run a function that the recording does not have here, which gives no tensor if the path is the same."""
        out = function(*args, **kwargs)
        if tensors_of(out):
            raise OtherPathError(f"`{function_name(function)}` would be called, another path through the code")
        if out is not None and self._placeholders.among(tensors_of((args, kwargs))):
            raise ValueNeededError(function_name(function))
        return out

    def _compared(
        self, call: Call, args: Any, kwargs: Any, inputs: Sequence[Tensor]
    ) -> tuple[Any, str | None, Tensor | None]:
        """Run a call; return its result, how it differs from the one expected, and the labels concerned if known."""
        if call.function == SET_DATA and args[0].shape != args[1].shape:
            return None, f"`data` of shape {tuple(args[0].shape)} would be set to {tuple(args[1].shape)}", None
        if call.name in _FREE_OF_COUNTS:
            skip = self._tracer.skip_products and call.name in PRODUCT_FUNCTIONS
            out = self._placeholders.product(call.name, call.function, args, kwargs) if skip else None
            out = call.function(*args, **kwargs) if out is None else out
            return out, self._shape_error(call, tensors_of(out)), None
        for tensor, recorded in zip(inputs, call.inputs, strict=True):
            self._tracer.set_labels(tensor, self.expected.labels(recorded))
        self._tracer.history.clear()
        self._union.merged.clear()
        with self._tracer:
            out = call.function(*args, **kwargs)
        error = self._shape_error(call, tensors_of(out))
        if error is None and self._union.merged:
            return out, "channels would be combined with other channels than before", torch.cat(self._union.merged)
        if error is None and self._compare_order:
            return out, *self._order_error(call)
        return out, error, None

    def _shape_error(self, call: Call, outputs: Sequence[Tensor]) -> str | None:
        """Describe how the result differs along dimensions that carry channels."""
        if len(outputs) != len(call.outputs):
            return f"`{call.name}` would give {len(outputs)} tensors instead of {len(call.outputs)}"
        for tensor, recorded in zip(outputs, call.outputs, strict=True):
            shape = self.expected.shape(recorded)
            if shape is None or shape == tensor.shape:
                continue
            dims = {dim for label in recorded.labels for dim in varying(label)}
            if len(shape) != tensor.dim() or any(shape[dim] != tensor.shape[dim] for dim in dims):
                return f"`{call.name}` would give the shape {tuple(tensor.shape)}"
        return None

    def _order_error(self, call: Call) -> tuple[str | None, Tensor | None]:
        """Describe the first operation of the call that reads other channels, and give their labels."""
        steps = paired_steps(self._recording.history[call.operations], self._tracer.history)
        for (name, was), (_, now) in steps:
            for left, right in zip(was, now, strict=False):
                if any(bool((label >= self.expected.removed.numel()).any()) for label in right):
                    continue  # the first state of a recurrent layer, which is labelled by what it meets later
                kept = ~self.expected.removed
                before = channel_orders(left, kept, name)
                after = channel_orders([self._union.roots(label) for label in right], kept, name)
                if before != after:
                    labels = torch.tensor([label for order in before ^ after for label in order])
                    return f"`{name}` would read other channels than before", labels
        return None, None

    def _replaced(self, call: Call, error: str, inputs: Sequence[Tensor], labels: Tensor | None = None) -> Any:
        """Note the break, and return a result that has the right shape."""
        if labels is None:
            labels = self.expected.removed_from([*call.inputs, *call.outputs])
        self.breaks.append(Break(self._position - 1, error, torch.unique(labels)))
        tensors = [self._right(recorded, inputs) for recorded in call.outputs]
        self._placeholders.add(tensors)
        return rebuilt(call.structure, tensors)

    def _run_forward(self, key: tuple[str, int], forward: Callable[[], Any]) -> Any:
        """Run the ``forward`` of a module; where it fails or takes another path, go on after it."""
        try:
            return forward()
        except (*FORWARD_ERRORS, OtherPathError) as error:
            result = self._recording.results.get(key)
            if result is None or result.structure is None or not result.start <= self._position <= result.end:
                raise
            with torch._C.DisableTorchFunction():
                return self._replaced_module(result, error)

    def _replaced_module(self, result: ModuleResult, error: Exception) -> Any:
        """Note that a module failed at the next call, and return a result that has the right shape."""
        assert result.structure is not None
        tensors = [self._right(recorded, ()) for recorded in result.outputs]
        position = max(min(self._position, result.end - 1), 0)
        calls = self._recording.calls[result.start : position + 1]
        labels = self.expected.removed_from([x for call in calls for x in (*call.inputs, *call.outputs)])
        kind: Kind = "path" if isinstance(error, OtherPathError) else "module"
        self.breaks.append(Break(position, str(error).partition("\n")[0], labels, kind))
        self._placeholders.add(tensors)
        self._position = result.end
        return rebuilt(result.structure, tensors)

    def _right(self, recorded: Recorded, inputs: Sequence[Tensor]) -> Tensor:
        shape = self.expected.shape(recorded)
        if shape is None:
            raise OtherPathError("a result of unknown shape")
        if recorded.alias is not None and recorded.alias < len(inputs) and inputs[recorded.alias].shape == shape:
            return inputs[recorded.alias]
        return torch.zeros(shape, dtype=recorded.dtype, device=recorded.device)
