"""The training step is traced: what only training reads counts, and nothing of the trace is left."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_light.dependency import DependencyGraph, trace_calls, trace_dependencies
from lightning_light.surgery.edit import cut
from lightning_light.training_step import step_call
from tests.zoo import noise

BATCH = noise(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])


def encoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
    )


class Classifier(L.LightningModule):
    """The step calls the network, not the module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(encoder(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(12, 5))
        self.seen: list[int] = []
        self.total = torch.zeros(1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.seen.append(batch_idx)
        self.total += 1
        self.log("loss", loss)
        return loss


class Auxiliary(L.LightningModule):
    """A head, and a layer with a fixed width, that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck = encoder(), nn.Conv2d(12, 10, 1)
        self.head, self.auxiliary, self.fixed = nn.Linear(10, 5), nn.Linear(12, 5), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.body(x)).mean((2, 3)))

    def training_step(self, batch: Any) -> Any:
        features = self.body(batch[0])
        loss = F.cross_entropy(self(batch[0]), batch[1])
        loss = loss + F.cross_entropy(self.auxiliary(features.mean((2, 3))), batch[1])
        return {"loss": loss + self.fixed(self.neck(features).mean((2, 3)).view(-1, 10)).square().mean()}


class Autoencoder(L.LightningModule):
    """The output is compared with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.decoder = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self.decoder(self.encoder(batch[0])), batch[0])


class Twin(L.LightningModule):
    """A copy follows the network by a moving average, which is updated in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(encoder(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
        self.twin = copy.deepcopy(self.net).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.update()
        with torch.no_grad():
            target = self.twin(batch[0])
        x = batch[0] + 0.1 * torch.randn_like(batch[0])
        return 2 - 2 * F.cosine_similarity(self.predictor(self.net(x)), target).mean()

    @torch.no_grad()
    def update(self) -> None:
        for old, new in zip(self.twin.parameters(), self.net.parameters(), strict=True):
            old.data = old.data * 0.9 + new.data * 0.1


class InPlace(Twin):
    @torch.no_grad()
    def update(self) -> None:
        for old, new in zip(self.twin.parameters(), self.net.parameters(), strict=True):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)


class Hooked(Twin):
    """The moving average is updated in a hook of the module."""

    def update(self) -> None: ...

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["loss"].dim() == 0
        for old, new in zip(self.twin.parameters(), self.net.parameters(), strict=True):
            old.lerp_(new, 0.1)


class Adversarial(L.LightningModule):
    """Two optimizers by hand, and a penalty on a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3 * 8 * 8))
        self.critic = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.LeakyReLU(), nn.Conv2d(8, 11, 3), nn.Flatten(), nn.Linear(11, 1)
        )

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.critic.parameters())], []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        made = self.generator(torch.randn(batch[0].shape[0], 6)).view(-1, 3, 8, 8)
        self.manual_backward(F.softplus(-self.critic(made)).mean())
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        real = batch[0].detach().requires_grad_()
        judged = self.critic(real)
        slope = torch.autograd.grad(judged.sum(), real, create_graph=True)[0].square().sum((1, 2, 3)).mean()
        loss = F.softplus(-judged).mean() + F.softplus(self.critic(made.detach())).mean() + slope
        loss.backward()
        second.step()


MODULES: dict[str, tuple[type[L.LightningModule], set[str]]] = {
    "classifier": (Classifier, {"net.0.0", "net.0.3"}),
    "auxiliary": (Auxiliary, {"body.0", "body.3"}),
    "autoencoder": (Autoencoder, {"encoder.0", "encoder.3", "decoder.0"}),
    "twin": (Twin, {"net.0.0", "net.0.3", "net.3", "predictor.0"}),
    "twin in place": (InPlace, {"net.0.0", "net.0.3", "net.3", "predictor.0"}),
    "twin in a hook": (Hooked, {"net.0.0", "net.0.3", "net.3", "predictor.0"}),
    "adversarial": (Adversarial, {"generator.0", "critic.0", "critic.2"}),
}


def traced(name: str) -> tuple[L.LightningModule, DependencyGraph]:
    torch.manual_seed(0)
    module = MODULES[name][0]()
    return module, trace_calls(module, [step_call(module, BATCH)])


@pytest.mark.parametrize("name", list(MODULES))
def test_the_groups_of_a_step(name) -> None:
    _, graph = traced(name)
    assert {group.name for group in graph.groups if group.reason is None} == MODULES[name][1]


@pytest.mark.parametrize("name", list(MODULES))
def test_a_cut_module_goes_on_training(name) -> None:
    module, graph = traced(name)
    kept = {group.name: torch.arange(group.width) >= 2 for group in graph.groups if group.reason is None}
    before = sum(p.numel() for p in module.parameters())
    cut(module, graph.kept_positions(kept), attributes=graph.attributes(module, kept))
    assert sum(p.numel() for p in module.parameters()) < before
    data = torch.utils.data.DataLoader(list(zip(*BATCH, strict=True)), batch_size=4)
    if name != "adversarial":
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.01)  # type: ignore[method-assign]
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_steps=2, accelerator="cpu", enable_model_summary=False, **options).fit(module, data)


def test_a_twin_is_removed_with_its_network() -> None:
    _, graph = traced("twin in a hook")
    group = next(group for group in graph.groups if group.name == "net.0.0")
    assert {"net.0.0.weight", "twin.0.0.weight", "net.0.1.running_mean"} <= {m.tensor for m in group.members}


def test_only_the_step_shows_what_training_reads() -> None:
    torch.manual_seed(0)
    module = Auxiliary()
    forward = trace_dependencies(module, (BATCH[0],))
    assert "neck" in {group.name for group in forward.groups if group.reason is None}
    reasons = {group.name: group.reason for group in trace_calls(module, [step_call(module, BATCH)]).groups}
    assert "[-1, 10]" in reasons["neck"]
    assert "no layer" in reasons["fixed"]
    assert "class scores" in reasons["head"]


def test_a_head_that_has_not_run_keeps_what_it_might_read() -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(12, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx < 100 else loss + self.late(self.net[:3](batch[0])).mean()

    def reason(module: Late, tensor: str) -> str | None:
        groups = trace_calls(module, [step_call(module, BATCH)]).groups
        return next(group.reason for group in groups if any(member.tensor == tensor for member in group.members))

    module = Late()
    assert "may be read" in reason(module, "net.0.3.bias")
    assert reason(module, "net.0.0.bias") is None
    module.late.requires_grad_(False)
    assert reason(module, "net.0.3.bias") is None


@pytest.mark.parametrize("name", list(MODULES))
def test_tracing_a_step_changes_nothing(name) -> None:
    torch.manual_seed(0)
    module = MODULES[name][0]()
    module.eval()
    next(module.children()).train()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    places = [tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]]
    tables = {key: dict(vars(inner)) for key, inner in module.named_modules()}
    random = torch.get_rng_state()
    trace_calls(module, [step_call(module, BATCH)])
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert places == [tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]]
    assert torch.equal(random, torch.get_rng_state())
    for key, inner in module.named_modules():
        found = vars(inner)
        assert list(found) == list(tables[key])
        assert all(found[attribute] is value for attribute, value in tables[key].items())
    if isinstance(module, Classifier):
        assert module.seen == []
        assert module.total.item() == 0.0
