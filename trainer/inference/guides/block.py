"""A Gaussian of any covariance within each site, in unconstrained space; sites are independent of each other.

Shapes: D latents.
"""

from trainer.inference.guides.full_rank import FullRank
from trainer.inference.guides.mean_field import MeanField
from trainer.inference.guides.pattern import Pattern
from trainer.inference.model.plates import Batch, PlatedModel


class Block(FullRank):
    """The full-rank guide with a group of its own for each site."""

    kind = "block (full within sites)"

    def arrange(self, model: PlatedModel, batch: Batch) -> None:
        MeanField.arrange(self, model, batch)
        self.pattern = Pattern(tuple((1, site.size) for site in self.sites))
        self.refuse_many("block")
