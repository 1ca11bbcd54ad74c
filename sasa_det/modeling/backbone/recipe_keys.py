"""A warning where a backbone of a recipe is trained without the recipe."""

from torch import nn

from ...config.recipe import warn_of_unread


class KnowsItsRecipe(nn.Module):
    """A backbone that says, when its training begins, what of its config is not read.

    Attributes:
        recipe_keys (tuple[str, ...]): :func:`sasa_det.config.recipe.recipe_keys` of the config that
            it was built from.
    """

    recipe_keys = ()  # not annotated, for TorchScript

    def train(self, mode: bool = True) -> "KnowsItsRecipe":
        if mode and self.recipe_keys:
            warn_of_unread(self.recipe_keys)
            self.recipe_keys = ()
        return super().train(mode)
