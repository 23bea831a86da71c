"""The README's picture, from a finished run of the main job.

``python examples/01_prune_and_export.py && python docs/images/draw.py runs/prune_and_export``
"""

import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_light.measure.history import History
from lightning_light.monitors import report_image


def main(run: Path) -> None:
    """Draw the last run that is logged under ``run``, beside the dense one before it."""
    versions = sorted(run.glob("lightning_logs/version_*"), key=lambda path: int(path.name.partition("_")[2]))
    dense, pruned = versions[-2:]
    (checkpoint,) = pruned.glob("checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["lightning_light"]["state"]["compression_monitor"]
    report_image(
        History.from_plain(state["history"]),
        Path(__file__).with_name("prune_and_export.png"),
        metrics={"validation accuracy": accuracy(pruned), "of the dense network in the same epochs": accuracy(dense)},
        title="Fashion-MNIST: pruned to 40 % of its MACs under a dense teacher",
    )


def accuracy(version: Path) -> list[tuple[int, float]]:
    """Read (step, validation accuracy) from the event files of a run."""
    events = EventAccumulator(str(version)).Reload()
    return [(event.step, event.value) for event in events.Scalars("val_accuracy")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
