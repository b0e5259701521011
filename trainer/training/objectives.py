"""Where an objective that weights whole draws cannot be had."""

import torch
from pyro import poutine
from torch import Tensor

from trainer.errors import UserError
from trainer.inference.guides.mean_field import Noise
from trainer.inference.model.plates import Batch
from trainer.inference.objectives.objective import Objective
from trainer.inference.step import Inference


def title(objective: Objective) -> str:
    """Its name in a sentence."""
    return f"objective={type(objective).__name__.lower()}"


def refuse_parts(objective: Objective, steps_per_epoch: int, groups: int) -> None:
    """Raises UserError where a lane group of a step holds less than all rows."""
    if steps_per_epoch > 1 or groups > 1:
        parts = f"an epoch has {steps_per_epoch:,} steps" if steps_per_epoch > 1 else f"a step has {groups} draws"
        raise UserError(
            f"{title(objective)} weights draws by all rows, and {parts}: give batch_size= the number of rows and train "
            "one rank with draws=1, or leave objective=elbo."
        )


def refuse_weighted_draws(inference: Inference, theta: Tensor, rows: Batch) -> None:
    """Raises UserError for a guide without weights for its draws, or a gradient that is not doubly reparameterized."""
    guide, name = inference.guide, title(inference.objective)
    if "kl_local" in inference.kinds:
        raise UserError(
            f"{name} weights draws of latents outside the data plate, and the guide draws latents of rows: leave "
            "objective=elbo."
        )
    if guide.still or guide.states:
        why = "draws nothing" if guide.still else "holds discrete latents, which are enumerated"
        raise UserError(f"{name} weights draws, and the guide {why}: leave objective=elbo.")
    if inference.objective.kl == "sticking_the_landing" and _model_is_trained(inference, theta, rows):
        raise UserError(
            f"{name} with objective.doubly=true has a gradient of the guide's parameters alone, and the model has "
            "parameters of its own: set objective.doubly=false."
        )


def _model_is_trained(inference: Inference, theta: Tensor, rows: Batch) -> bool:
    """Whether the log joint at a fixed draw depends on theta [P]."""
    at = theta.detach().clone().requires_grad_()
    elements, own = inference.guide.noise_size
    noise = Noise(theta.new_full((elements,), 0.5), theta.new_full((rows.size, own), 0.5) if own else None, 0)

    def log_joint(values: dict[str, Tensor]) -> Tensor:
        drawn = inference.guide.draw(inference.model, values, noise, rows, "monte_carlo").trace
        fixed = drawn.copy()
        fixed.detach_()
        trace = poutine.trace(poutine.replay(inference.model, trace=fixed)).get_trace(rows)
        return torch.as_tensor(trace.log_prob_sum())

    with torch.enable_grad():
        total = inference.parameters.call(inference.parameters.unflatten(at), log_joint)
        if not total.requires_grad:
            return False
        (found,) = torch.autograd.grad(total, at, allow_unused=True)
    return found is not None and bool((found != 0).any())
