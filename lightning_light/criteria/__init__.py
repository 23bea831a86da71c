"""Score weights from evidence about them; the lowest scores are removed first."""

from lightning_light.criteria.activation import Activation, Wanda
from lightning_light.criteria.collector import EvidenceCollector
from lightning_light.criteria.data import collect_evidence
from lightning_light.criteria.evidence import Criterion, Evidence
from lightning_light.criteria.gathered import Gathered
from lightning_light.criteria.geometry import GeometricMedian
from lightning_light.criteria.gradient import SNIP, Hessian, Movement, SoftMovement, Taylor
from lightning_light.criteria.group_criterion import GroupCriterion, check_needs
from lightning_light.criteria.learned_gates import LearnedGates
from lightning_light.criteria.magnitude import BatchNormScale, Magnitude
from lightning_light.criteria.random import Random
from lightning_light.criteria.reduction import Normalizer, Reduction, channel_scores, combine, normalize
from lightning_light.criteria.torch_pruning import FromTorchPruning

__all__ = [
    "Activation",
    "BatchNormScale",
    "Criterion",
    "Evidence",
    "EvidenceCollector",
    "FromTorchPruning",
    "Gathered",
    "GeometricMedian",
    "GroupCriterion",
    "Hessian",
    "LearnedGates",
    "Magnitude",
    "Movement",
    "Normalizer",
    "Random",
    "Reduction",
    "SNIP",
    "SoftMovement",
    "Taylor",
    "Wanda",
    "channel_scores",
    "check_needs",
    "collect_evidence",
    "combine",
    "normalize",
]
