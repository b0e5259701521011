"""Flight delays: a plain Pyro model, as one would write it for data in memory.

Shapes: B rows; 8 coefficients: intercept, distance, and three harmonics of the time of day.
"""

import math

import pyro
import pyro.distributions as dist
import torch


def design(distance, time):
    """[B, 8] from miles [B] and hours [B]."""
    angles = [2 * math.pi * k * time / 24 for k in (1, 2, 3)]
    waves = [wave for angle in angles for wave in (torch.sin(angle), torch.cos(angle))]
    return torch.stack([torch.ones_like(distance), distance / 1000 - 0.7, *waves], dim=-1)


def delay_model(distance, time, delay=None):
    """delay / 10 minutes ~ Normal(design @ b, sigma)."""
    b = pyro.sample("b", dist.Normal(0.0, 10.0).expand([8]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("data", len(distance)):
        pyro.sample("delay", dist.Normal(design(distance, time) @ b, sigma), obs=None if delay is None else delay / 10)
