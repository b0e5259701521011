"""The arrow of a Hessian from its products: exact where there is nothing but the arrow."""

import torch
from svi_problems import F64

from trainer.inference.guides.gaussian import Diagonal, GaussianView
from trainer.inference.model.latents import LatentSite
from trainer.inference.recipe.arrowhead import arrow

GROUPS, LENGTH = 100, 3


def view(*shapes):
    sites, size = [], 0
    for number, shape in enumerate(shapes):
        sites.append(LatentSite(f"site_{number}", shape, size))
        size += sites[-1].size
    return GaussianView(tuple(sites), slice(0, size), Diagonal(slice(size, 2 * size)))


def hierarchy(top=2):
    """A positive definite matrix: so many latents that hang together with all, and groups of three."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(GROUPS, LENGTH, LENGTH, generator=generator, dtype=F64)
    matrix = torch.zeros(top + GROUPS * LENGTH, top + GROUPS * LENGTH, dtype=F64)
    matrix[top:, top:] = torch.block_diag(*(root @ root.mT + torch.eye(LENGTH, dtype=F64)))
    border = torch.randn(top, GROUPS * LENGTH, generator=generator, dtype=F64)
    matrix[:top, top:], matrix[top:, :top] = border, border.T
    matrix[:top, :top] = border @ torch.linalg.solve(matrix[top:, top:], border.T) + torch.eye(top, dtype=F64)
    return matrix


class Product:
    """With a matrix; counts its calls."""

    def __init__(self, matrix):
        self.matrix, self.calls = matrix, 0

    def __call__(self, v):
        self.calls += 1
        return self.matrix @ v


def test_an_arrow_is_solved_exactly_from_a_product_for_each_top_level_latent_and_neighbor():
    matrix, v = hierarchy(), torch.randn(302, generator=torch.Generator().manual_seed(1), dtype=F64)
    product = Product(matrix)
    made = arrow(view((2,), (GROUPS, LENGTH)), product, torch.device("cpu"))
    assert product.calls == 2 + LENGTH
    torch.testing.assert_close(made.diagonal, matrix.diagonal())
    torch.testing.assert_close(made.solve(v), torch.linalg.solve(matrix, v))


def test_top_level_latents_may_stand_anywhere():
    """One before the groups, one after them."""
    order = [0, *range(2, 302), 1]
    matrix, v = hierarchy()[order][:, order], torch.randn(302, generator=torch.Generator().manual_seed(1), dtype=F64)
    made = arrow(view((), (GROUPS, LENGTH), (1,)), Product(matrix), torch.device("cpu"))
    torch.testing.assert_close(made.solve(v), torch.linalg.solve(matrix, v))


def test_of_too_many_small_sites_nothing_is_asked():
    matrix = hierarchy(top=33)
    product = Product(matrix)
    made = arrow(view((33,), (GROUPS, LENGTH)), product, torch.device("cpu"))
    assert product.calls == LENGTH
    assert made.diagonal[:33].tolist() == [1.0] * 33
    v = torch.ones(333, dtype=F64)
    below = torch.linalg.solve(matrix[33:, 33:], v[33:])
    torch.testing.assert_close(made.solve(v), torch.cat([v[:33], below]))


def test_the_diagonal_of_neighbors_that_are_many_is_found_where_only_the_nearest_hang_together():
    """A walk in one dimension, and the elements of a long last dimension."""
    walk = 2.5 * torch.eye(300, dtype=F64) - torch.diag(torch.ones(299, dtype=F64), 1)
    walk = walk - torch.diag(torch.ones(299, dtype=F64), -1)
    for shape, calls in (((300,), 2), ((10, 30), 8)):
        product = Product(walk)
        made = arrow(view(shape), product, torch.device("cpu"))
        assert product.calls == calls
        torch.testing.assert_close(made.diagonal, walk.diagonal())
        torch.testing.assert_close(made.solve(walk.diagonal()), torch.ones(300, dtype=F64))


def test_a_diagonal_that_is_not_positive_gives_none():
    assert arrow(view((2,), (GROUPS, LENGTH)), Product(-hierarchy()), torch.device("cpu")) is None


def test_what_is_no_arrow_still_gives_a_positive_definite_matrix():
    """Groups that are saddles, and a top-level latent that what is unseen alone keeps from being one."""
    matrix = hierarchy()
    matrix[2:, 2:] = torch.block_diag(*(torch.ones(3, 3, dtype=F64) - 0.1 * torch.eye(3) for _ in range(GROUPS)))
    made = arrow(view((2,), (GROUPS, LENGTH)), Product(matrix), torch.device("cpu"))
    solved = torch.stack([made.solve(unit) for unit in torch.eye(302, dtype=F64)])
    torch.testing.assert_close(solved, solved.T)
    assert (torch.linalg.eigvalsh(solved) > 0).all()
