"""`LightningLightCLI`: LightningCLI whose errors are one sentence with the nearest name."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_light.cli.sentences import OURS, with_sentences
from lightning_light.errors import LightningLightError
from lightning_light.host.cli import lightning_cli_of
from lightning_light.planning import plan

__all__ = ["LightningLightCLI"]

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI
else:
    LightningCLI = object


class LightningLightCLI(LightningCLI):
    """LightningCLI with short names of the methods, errors of one sentence, and the subcommand ``plan``.

    Use it as LightningCLI, of either host. A wrong key or class gives the nearest one, a wrong value this package's
    sentence; the exit status is 2. What a run refuses is one sentence too, with exit status 1. Errors of the user's own
    code keep their traceback. ``plan`` takes the configuration of ``fit`` and prints `lightning_light.plan`.

    A whole ``main.py``, run as ``python main.py fit --config run.yaml``::

        from lightning_light.cli import LightningLightCLI
        from my_project import MyData, MyModule

        LightningLightCLI(MyModule, MyData)

    Args:
        model_class: as for LightningCLI, like all other arguments.
        *args: positional arguments.
        **kwargs: keyword arguments.
    """

    def __new__(cls, model_class: Any = None, *args: Any, **kwargs: Any) -> LightningLightCLI:
        """Derive from LightningCLI of the host of ``model_class``."""
        base = lightning_cli_of(model_class)
        made = cls if issubclass(cls, base) else type(cls.__name__, (cls, base), {"__module__": cls.__module__})
        return object.__new__(made)

    def __init__(self, model_class: Any = None, *args: Any, **kwargs: Any) -> None:
        parsers = sys.modules[lightning_cli_of(model_class).__module__]
        kwargs.setdefault("parser_class", with_sentences(parsers.LightningArgumentParser))
        self._plans = False
        try:
            super().__init__(model_class, *args, **kwargs)
        except LightningLightError as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse ``plan`` as ``fit``."""
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list) and given[:1] == ["plan"]:
            self._plans, args = True, ["fit", *given[1:]]
            if sys.argv[1:] == given:
                sys.argv = [sys.argv[0]]  # LightningCLI warns of arguments that are given twice
        super().parse_arguments(parser, args)

    @override
    def instantiate_classes(self) -> None:
        """Build the objects; of a wrong value only the sentence is shown."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            found = OURS.search(str(error))
            if found is None:
                raise
            sys.stderr.write(f"error: {found[0]}\n")
            raise SystemExit(2) from error

    def fit(self, **kwargs: Any) -> None:
        """Run ``fit``, or print its plan."""
        if not self._plans:
            self.trainer.fit(**kwargs)
            return
        model, data = self.model, self.datamodule
        given = model if data is None else data
        found = plan(
            model,
            given,
            self.trainer.callbacks,  # type: ignore[attr-defined]  # set by a connector
            max_epochs=None if (self.trainer.max_epochs or 0) < 1 else self.trainer.max_epochs,
        )
        sys.stdout.write(f"{found}\n")
