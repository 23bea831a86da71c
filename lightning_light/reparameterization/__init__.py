"""Re-parameterization: train convolutions as parallel branches, and merge them into the one that is deployed."""

from lightning_light.reparameterization.apply import Expansion
from lightning_light.reparameterization.forms import ACB, DBB, OREPA, Branches, Form, RepVGG
from lightning_light.reparameterization.functional import Merging, expand_branches, merge_branches, merge_checkpoint
from lightning_light.reparameterization.reparameterization import Reparameterization

__all__ = [
    "ACB",
    "Branches",
    "DBB",
    "Expansion",
    "Form",
    "Merging",
    "OREPA",
    "RepVGG",
    "Reparameterization",
    "expand_branches",
    "merge_branches",
    "merge_checkpoint",
]
