"""Which mesh axes a value varies over, inside a `shard_map`.

`shard_map` tracks the mesh axes along which devices hold different values, and checks that a loop's carry keeps them.
An axis that a value does not vary over needs a sum in the backward pass, and where a value starts to vary is where that
sum will stand. So we say it once, before a loop, rather than let it happen inside one.
"""

import jax
from jax import lax


def axes_of(tree) -> frozenset[str]:
    """Mesh axes that any array of `tree` varies over; empty outside a shard_map."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary_over(tree, axes: frozenset[str]):
    """Return the same values, typed as varying over at least `axes`."""

    def cast(x):
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def vary_together(*trees):
    """The trees, every array typed as varying over all the axes that any of them varies over."""
    return vary_over(trees, axes_of(trees))
