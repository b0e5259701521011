"""Schedules against torch.optim.lr_scheduler where it has them, against their formula where not."""

import pytest
import torch

from trainer.inference.optim.schedules import Constant, Cosine, OneCycle, RobbinsMonro

H = 40


def factors(schedule, steps=H):
    return [float(schedule(torch.tensor(t), H)) for t in range(steps)]


def torch_factors(make, lr, steps=H):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        scheduler.step()
    return out


def test_cosine_equals_torch():
    oracle = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=H, eta_min=0.02), 0.2)
    assert factors(Cosine(final=0.1)) == pytest.approx(oracle, abs=1e-12)


def test_one_cycle_equals_torch():
    """torch's peak stands at pct_start * total_steps - 1, ours at warmup * horizon; its last step is our horizon."""

    def make(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.2, total_steps=H + 1, pct_start=13 / (H + 1), div_factor=25.0, final_div_factor=400.0
        )

    oracle = torch_factors(make, 0.2, H + 1)
    ours = [float(OneCycle(warmup=12 / H, start=0.04, final=1e-4)(torch.tensor(t), H)) for t in range(H + 1)]
    assert ours == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(), {0: 1.0, 17: 1.0, 400: 1.0}),
        (RobbinsMonro(delay=1.0, forgetting=0.7), {0: 1.0, 1: 1.5**-0.7, 9: 5.5**-0.7}),
        (RobbinsMonro(delay=0.0, forgetting=1.0), {0: 1.0, 1: 1 / 2, 9: 1 / 10}),
        (Cosine(final=0.0), {0: 1.0, H // 2: 0.5, H: 0.0, 3 * H: 0.0}),
        (OneCycle(warmup=0.25), {0: 0.04, H // 4: 1.0, H: 1e-4, 3 * H: 1e-4}),
    ],
)
def test_values(schedule, values):
    for step, value in values.items():
        out = schedule(torch.tensor(step), H)
        assert out.dtype == torch.float64
        assert float(out) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("forgetting", [0.5, 1.01])
def test_robbins_and_monro_refuse_what_does_not_converge(forgetting):
    with pytest.raises(ValueError, match="forgetting"):
        RobbinsMonro(forgetting=forgetting)
