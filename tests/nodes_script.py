"""One of two nodes: ``torchrun --nnodes 2 ... -m tests.nodes_script FOLDER END [CKPT]``; started by `test_nodes`.

Trains the chain of `kill_script` with one process per node, each with batches of its own; every rank writes what its
network is at the end to ``FOLDER/END-RANK.json``, and rank 0 its checkpoints.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_light.surgery.attachment import state_of
from lightning_light.surgery.distributed import digest
from tests.contract.bodies import Body, Loader, module_class
from tests.contract.runs import trainer
from tests.kill_script import chain


def main(folder: Path, end: str, resume: str | None) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    rank = int(os.environ["RANK"])
    module = module_class(Body, lightning.pytorch)()
    module.train_dataloader = lambda: Loader(turn=rank)
    saving = ModelCheckpoint(folder, "step={step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1)
    strategy = DDPStrategy(process_group_backend="gloo")
    callbacks = [*chain(folder / end), *([] if resume else [saving])]
    run = trainer(*callbacks, devices=1, num_nodes=2, strategy=strategy)
    run.fit(module, ckpt_path=resume)
    state = state_of(module)
    found = {
        "nodes": run.num_nodes,
        "parameters": digest(dict(module.named_parameters())),
        "edit_log": state.edit_log,
        "learned": digest(state.state["quantization_aware_training"]["learned"]),
        "steps": run.global_step,
    }
    (folder / f"{end}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
