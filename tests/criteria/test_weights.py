"""Criteria of single weights: SNIP, Wanda and the movement scores, restated in float64."""

import pytest
import torch

from lightning_light.criteria import SNIP, Evidence, Movement, SoftMovement, Wanda


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_snip_is_the_gradient_of_the_loss_by_a_switch_on_the_connection() -> None:
    """Lee et al., 2019, eq. 4: ``|dL/dc|`` at ``c = 1`` for ``w * c``."""
    w, x = some(4, 6), some(3, 6, seed=1)
    switch = torch.ones_like(w, requires_grad=True)
    (x @ (w * switch).T).square().sum().backward()
    weight = w.clone().requires_grad_()
    (x @ weight.T).square().sum().backward()
    torch.testing.assert_close(SNIP()(Evidence(w, grad=weight.grad)), switch.grad.abs())


def test_wanda_is_weight_times_norm() -> None:
    w, x = some(4, 6), some(9, 6, seed=1)
    expected = torch.stack([torch.stack([w[i, j].abs() * x[:, j].norm() for j in range(6)]) for i in range(4)])
    torch.testing.assert_close(Wanda()(Evidence(w, inputs=x.norm(dim=0)[None])), expected)


def test_movement_adds_minus_weight_times_gradient() -> None:
    total = torch.zeros(5, dtype=torch.float64)
    expected = torch.zeros(5, dtype=torch.float64)
    for step in range(4):
        w, g = some(5, seed=step), some(5, seed=10 + step)
        total = Movement().accumulate(total, w, g)
        expected = expected - w * g
    torch.testing.assert_close(Movement()(Evidence(some(5), movement=total)), expected)


def test_soft_movement_is_the_gradient_step_on_the_penalized_scores() -> None:
    """Sanh et al., 2020: ``S <- S - lr * (dL/dS + penalty * d sum(sigmoid(S)) / dS)``, ``dL/dS = dL/dW * W``."""
    criterion = SoftMovement(penalty=0.3, lr=0.1)
    s, w, g = some(5), some(5, seed=1), some(5, seed=2)
    scores = s.clone().requires_grad_()
    ((scores * (w * g)).sum() + 0.3 * torch.sigmoid(scores).sum()).backward()
    torch.testing.assert_close(criterion.accumulate(s, w, g), s - 0.1 * scores.grad)
    torch.testing.assert_close(criterion(Evidence(w, movement=s)), torch.sigmoid(s))


@pytest.mark.parametrize(("criterion", "piece"), [(SNIP(), "grad"), (Wanda(), "inputs"), (Movement(), "movement")])
def test_what_is_needed_must_be_there(criterion, piece) -> None:
    with pytest.raises(ValueError, match=piece):
        criterion(Evidence(some(2, 2)))


def test_inputs_that_do_not_fit_the_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a shape that broadcasts to \(4, 6\).*found \(1, 4\)"):
        Evidence(some(4, 6), inputs=some(1, 4))
