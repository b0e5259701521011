"""A Gaussian's view of theta: where its numbers lie, by site and by name."""

import pytest
import torch
from svi_problems import F64

from trainer.inference.guides.gaussian import Diagonal, GaussianView
from trainer.inference.model.latents import LatentSite

SITES = (LatentSite("a", (), 0), LatentSite("b", (2, 3), 1), LatentSite("c", (1,), 7))
D = 8
VIEW = GaussianView(SITES, slice(3, 3 + D), Diagonal(slice(12, 12 + D)))
"""With 3 parameters of others before the locations, 1 before the log sds and 2 after them."""
THETA = torch.linspace(-1, 1, 22, dtype=F64)


def test_sizes():
    assert (VIEW.size, VIEW.parameters) == (D, 2 * D)
    empty = GaussianView((), slice(0, 0), Diagonal(slice(0, 0)))
    assert (empty.size, empty.parameters, empty.by_site(THETA[:0])) == (0, 0, {})


def test_locations_and_sds_lie_where_the_view_says():
    assert torch.equal(VIEW.location(THETA), THETA[3:11])
    assert torch.equal(VIEW.sd(THETA), THETA[12:20].exp())
    assert VIEW.sd(THETA.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_goes_to_the_log_sds_goes_nowhere_else(dtype):
    theta, values = THETA.to(dtype), torch.arange(1.0, 1 + D, dtype=dtype)
    placed = VIEW.by_covariance(values, theta)
    assert (placed.shape, placed.dtype) == (theta.shape, dtype)
    assert torch.equal(placed[12:20], values)
    assert placed.count_nonzero() == D


def test_the_parameters_of_a_gaussian_alone_come_back():
    view = GaussianView(SITES, slice(0, D), Diagonal(slice(D, 2 * D)))
    loc, log_sd = torch.arange(float(D)), torch.linspace(-1, 1, D)
    theta = view.theta(loc, log_sd)
    assert torch.equal(view.location(theta), loc)
    torch.testing.assert_close(view.sd(theta).log(), log_sd)
    assert torch.equal(view.by_covariance(log_sd, theta)[D:], log_sd)


def test_a_vector_falls_apart_into_its_sites_in_row_major_order():
    parts = VIEW.by_site(torch.arange(D))
    assert {name: part.tolist() for name, part in parts.items()} == {"a": 0, "b": [[1, 2, 3], [4, 5, 6]], "c": [7]}
    with pytest.raises(RuntimeError):
        VIEW.by_site(torch.arange(D + 1))


def test_every_scalar_has_a_name():
    names = ["a", *(f"b[{i}, {j}]" for i in range(2) for j in range(3)), "c[0]"]
    assert [VIEW.latent_name(index) for index in range(D)] == names
