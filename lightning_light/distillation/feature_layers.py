"""Feature layers: pair modules of student and teacher by path or resolution, and record their outputs."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lightning_light.distillation.loss import FeatureLayers
from lightning_light.errors import TargetError
from lightning_light.host.patches import RunHook
from lightning_light.nested import tensors_in

__all__ = ["FeatureHooks", "match_resolutions", "module_at", "pair_feature_layers"]


def pair_feature_layers(feature_layers: FeatureLayers, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Pair the paths of feature layers in student and teacher, in the student's order.

    A glob selects the modules whose whole path it matches, where a ``*`` does not cross a dot. It must match equally
    many modules in both networks, which are paired in order.

    Raises:
        TargetError: a path names no module, or the two sides match different numbers. Prints the nearest names.

    Example:
        >>> pair_feature_layers("[02]", *(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.ReLU()) for _ in range(2)))
        [('0', '0'), ('2', '2')]
    """
    pairs: list[tuple[str, str]] = []
    for mine, theirs in _as_mapping(feature_layers).items():
        left, right = _matching(mine, student, "student"), _matching(theirs, teacher, "teacher")
        if len(left) != len(right):
            raise TargetError(
                f"`feature_layers={{{mine!r}: {theirs!r}}}`: expected equally many modules in student and teacher, "
                f"found {len(left)} ({', '.join(left)}) and {len(right)} ({', '.join(right)}). Name them one by one."
            )
        pairs += zip(left, right, strict=True)
    return pairs


def match_resolutions(
    student: Mapping[str, tuple[int, ...]], teacher: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str]]:
    """Pair, for each resolution of feature maps in both networks, the last module of each with such an output.

    Args:
        student: module path -> shape of its output, in the order of the calls; only those of four dimensions count.
        teacher: the same of the teacher.

    Example:
        >>> shapes = {"stem": (2, 8, 16, 16), "layer1": (2, 8, 16, 16), "layer2": (2, 16, 8, 8), "fc": (2, 10)}
        >>> match_resolutions(shapes, {"a": (2, 32, 16, 16), "b": (2, 64, 8, 8), "c": (2, 64, 4, 4)})
        [('layer1', 'a'), ('layer2', 'b')]
    """
    last_student, last_teacher = (
        {shape[2:]: path for path, shape in shapes.items() if len(shape) == 4 and path} for shapes in (student, teacher)
    )
    pairs = [(path, last_teacher[size]) for size, path in last_student.items() if size in last_teacher]
    if not pairs:
        raise TargetError(
            f"`feature_layers='auto'`: expected feature maps of one resolution in both networks, found resolutions "
            f"{sorted(last_student)} in the student and {sorted(last_teacher)} in the teacher. Name the layers: "
            "`feature_layers={'layer3': 'layer3'}`."
        )
    return pairs


class FeatureHooks:
    """Forward hooks that keep the latest output of modules, while they are enabled.

    Attributes:
        enabled: whether outputs are kept.
        features: module path -> output, as a tensor, in the order of the calls.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.features: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def register(self, model: nn.Module, paths: Iterable[str] | None) -> None:
        """Hook the modules at ``paths``, or all of them, and no others."""
        self.remove()
        for path, module in model.named_modules() if paths is None else [(p, model.get_submodule(p)) for p in paths]:
            self._hooks.enter_context(module.register_forward_hook(RunHook(self._hook(path))))

    def remove(self) -> None:
        """Remove the hooks and forget the features."""
        self._hooks.close()
        self.features.clear()

    def _hook(self, path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self.enabled and (tensor := next(tensors_in(output), None)) is not None:
                self.features.pop(path, None)  # keeps the order of the latest calls
                self.features[path] = tensor

        return keep


def _as_mapping(feature_layers: FeatureLayers) -> Mapping[str, str]:
    if isinstance(feature_layers, Mapping):
        return feature_layers
    return {path: path for path in ([feature_layers] if isinstance(feature_layers, str) else feature_layers or [])}


def _matching(pattern: str, model: nn.Module, who: str) -> list[str]:
    paths = {path.replace("_orig_mod.", ""): path for path, _ in model.named_modules()}  # the names before compilation
    known = [name for name in paths if name]
    depth = pattern.count(".")
    found = [paths[name] for name in known if name.count(".") == depth and fnmatch.fnmatchcase(name, pattern)]
    if found:
        return found
    raise _unknown(f"`feature_layers={pattern!r}`", f"a module of the {who} (`{type(model).__name__}`)", pattern, known)


def module_at(pl_module: nn.Module, path: str, call: str) -> nn.Module:
    """Return the module at ``path``.

    Args:
        pl_module: the LightningModule.
        path: of a part of it; empty for the LightningModule itself.
        call: the argument as the user wrote it, for the message.

    Raises:
        TargetError: there is none. Prints the nearest names.
    """
    parts: dict[str, nn.Module] = dict(pl_module.named_modules(remove_duplicate=False))
    if path not in parts:
        raise _unknown(f"`{call}`", f"a part of `{type(pl_module).__name__}`", path, [name for name in parts if name])
    return parts[path]


def _unknown(call: str, what: str, path: str, known: list[str]) -> TargetError:
    nearest = difflib.get_close_matches(path, known, n=5, cutoff=0.4) or known[:5]
    return TargetError(
        f"{call}: expected the path of {what}, found none among {len(known)}. Nearest: {', '.join(map(repr, nearest))}."
    )
