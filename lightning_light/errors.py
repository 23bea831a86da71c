"""One family of errors: everything that a user of this package may want to catch.

```
Exception
└── LightningLightError
    ├── BudgetError        (ValueError)           the budget cannot be reached
    ├── TargetError        (ValueError)           the targets name no layer
    ├── OrderError         (ValueError)           callbacks in an order that cannot work
    ├── TraceError         (RuntimeError)         the model cannot be traced
    ├── SurgeryError       (RuntimeError)         an edit was refused; the model is as it was
    ├── ManifestError      (RuntimeError)         a checkpoint of another model, or a damaged one
    ├── RankMismatchError  (RuntimeError)         processes of one run no longer agree
    ├── ParityError        (RuntimeError)         an exported file answers differently from the model
    └── UnsupportedError   (NotImplementedError)  a strategy, optimizer or launcher that cannot follow
```

A message says, in this order: the call as the user wrote it, what was expected, what was found, how to mend it.
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
    """The root: catches every error of this package and nothing else."""


class BudgetError(LightningLightError, ValueError):
    """The budget cannot be reached with the given targets."""


class TargetError(LightningLightError, ValueError):
    """The targets, or one of their patterns, name no layer of the model."""


class OrderError(LightningLightError, ValueError):
    """Callbacks stand in an order, or act in windows, that cannot work together."""


class TraceError(LightningLightError, RuntimeError):
    """The model cannot be traced, so it is not known which channels hang together."""


class SurgeryError(LightningLightError, RuntimeError):
    """An edit was refused. The model and its optimizers are exactly as they were."""


class ManifestError(LightningLightError, RuntimeError):
    """A checkpoint describes another model, or its manifest is damaged. Nothing was loaded."""


class RankMismatchError(LightningLightError, RuntimeError):
    """The processes of one run have decided differently. Raised on all of them."""


class ParityError(LightningLightError, RuntimeError):
    """An exported file does not answer as the model does."""


class UnsupportedError(LightningLightError, NotImplementedError):
    """A strategy, optimizer or launcher that cannot follow a change of structure. Says the way round."""


class NoEffectWarning(UserWarning):
    """A method found nothing to do, or did nothing during a whole run."""
