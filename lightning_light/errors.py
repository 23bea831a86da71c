"""Errors: everything that a user of this package may want to catch.

::

    Exception
    └── LightningLightError
        ├── BudgetError        (ValueError)           the budget cannot be reached
        ├── TargetError        (ValueError)           the targets match no layer
        ├── OrderError         (ValueError)           callbacks in an order that cannot work
        ├── TraceError         (RuntimeError)         the model cannot be traced
        ├── SurgeryError       (RuntimeError)         an edit was refused; the model is unchanged
        ├── ManifestError      (RuntimeError)         a checkpoint of another model, or a damaged one
        ├── RankMismatchError  (RuntimeError)         the processes of a run have diverged
        ├── ParityError        (RuntimeError)         the outputs of an exported file differ from the model's
        └── UnsupportedError   (NotImplementedError)  a strategy, optimizer, launcher or layer that is not supported

A message consists of: the call as the user wrote it, what was expected, what was found, how to correct it.
"""

__all__ = [
    "BudgetError",
    "LightningLightError",
    "ManifestError",
    "NoEffectWarning",
    "OrderError",
    "ParityError",
    "RankMismatchError",
    "SurgeryError",
    "TargetError",
    "TraceError",
    "UnsupportedError",
]


class LightningLightError(Exception):
    """Base class of every error of this package."""


class BudgetError(LightningLightError, ValueError):
    """The budget cannot be reached with the given targets."""


class TargetError(LightningLightError, ValueError):
    """The targets, or one of their patterns, match no layer of the model."""


class OrderError(LightningLightError, ValueError):
    """The order of the callbacks, or of their windows, cannot work."""


class TraceError(LightningLightError, RuntimeError):
    """The model cannot be traced, so it is not known which channels are coupled."""


class SurgeryError(LightningLightError, RuntimeError):
    """An edit was refused. The model and its optimizers are unchanged."""


class ManifestError(LightningLightError, RuntimeError):
    """A checkpoint describes another model, or its manifest is damaged. Nothing was loaded."""


class RankMismatchError(LightningLightError, RuntimeError):
    """The processes of a run have made different decisions. Raised on all of them."""


class ParityError(LightningLightError, RuntimeError):
    """The outputs of an exported file differ from those of the model by more than the tolerance."""


class UnsupportedError(LightningLightError, NotImplementedError):
    """A strategy, optimizer, launcher or layer does not support the change. The message has an alternative."""


class NoEffectWarning(UserWarning):
    """A method had no effect during a whole run."""
