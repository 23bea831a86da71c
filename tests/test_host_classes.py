"""Both class trees are known, in this process and in ones that load only one of them."""

import importlib
import subprocess
import sys

import lightning.pytorch
import pytest
import pytorch_lightning

from lightning_light.host import classes
from lightning_light.host.classes import Callback, host_class, is_host, loaded_hosts

HOSTS = [lightning.pytorch, pytorch_lightning]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_both_are_loaded_here() -> None:
    assert loaded_hosts() == ("lightning.pytorch", "pytorch_lightning")


@pytest.mark.parametrize("host", HOSTS)
def test_is_host_knows_a_class_of_either(host) -> None:
    assert is_host(host.callbacks.ModelCheckpoint(), "ModelCheckpoint")
    assert is_host(host.callbacks.ModelCheckpoint(), "callbacks.ModelCheckpoint")
    assert is_host(host.callbacks.ModelCheckpoint(), "Callback")
    assert not is_host(host.callbacks.Timer(), "ModelCheckpoint")
    assert is_host(host.LightningModule(), "LightningModule")
    assert is_host(host.strategies.DDPStrategy(), "DDPStrategy")


def test_a_typing_mistake_is_not_a_no() -> None:
    with pytest.raises(ValueError, match=r"`is_host\(..., 'ModelChekpoint'\)`: expected a class of Lightning"):
        is_host(object(), "ModelChekpoint")
    with pytest.raises(ValueError, match="expected a class of Lightning"):
        is_host(object(), "nowhere.ModelCheckpoint")


@pytest.mark.parametrize("host", HOSTS)
def test_host_class_stays_in_the_family(host) -> None:
    class Mine(host.LightningModule):
        pass

    for near in (Mine(), host.callbacks.Timer()):
        assert host_class(near, "callbacks.ModelCheckpoint") is host.callbacks.ModelCheckpoint
        assert host_class(near, "pytorch.callbacks.ModelCheckpoint") is host.callbacks.ModelCheckpoint
        assert host_class(near, "Trainer") is host.Trainer


def test_host_class_of_fabric() -> None:
    import lightning.fabric
    import lightning_fabric

    assert host_class(lightning.pytorch.callbacks.Timer(), "fabric.Fabric") is lightning.fabric.Fabric
    assert host_class(pytorch_lightning.callbacks.Timer(), "fabric.Fabric") is lightning_fabric.Fabric


def test_host_class_refuses_strangers() -> None:
    with pytest.raises(ValueError, match="an object of neither host"):
        host_class(object(), "Trainer")
    with pytest.raises(ValueError, match=r"no 'Trainr' in lightning\.pytorch"):
        host_class(lightning.pytorch.callbacks.Timer(), "Trainr")


def test_a_callback_is_one_of_lightning_pytorch() -> None:
    assert issubclass(Callback, lightning.pytorch.Callback)
    assert Callback.__module__ == classes.__name__


CHECK = """
import {first}
from lightning_light.host.classes import Callback, loaded_hosts
class Mine(Callback):
    pass
print(*[base.__module__.partition(".")[0] for base in Callback.__bases__])
"""


@pytest.mark.slow
def test_a_callback_is_one_of_each_host_loaded_before() -> None:
    assert run(CHECK.format(first="lightning.pytorch")) == "lightning"
    assert run(CHECK.format(first="pytorch_lightning")) == "lightning pytorch_lightning"
    assert run(CHECK.format(first="torch")) == "lightning"


@pytest.mark.slow
def test_pytorch_lightning_alone_will_do() -> None:
    hide = "import sys, importlib.util as u; find = u.find_spec; sys.modules['lightning'] = None\n"
    hide += "u.find_spec = lambda name, *a: None if name == 'lightning' else find(name, *a)\n"
    assert run(hide + CHECK.format(first="torch")) == "pytorch_lightning"


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers", "ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("host", HOSTS)
def test_either_trainer_calls_our_hooks(host) -> None:
    class Counter(Callback):
        calls = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.calls += 1

    counter = Counter()
    module = importlib.import_module(f"{host.__name__}.demos.boring_classes").BoringModel()
    trainer = host.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[counter],
        limit_val_batches=0,
    )
    trainer.fit(module, module.train_dataloader())
    assert counter.calls == 3
