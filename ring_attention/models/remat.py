"""What is kept of a layer for its backward pass, and where."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from ring_attention.parallel.strategy import SAVED_NAMES

_INPUT = "layer_input"


def name_input(x_btM: jax.Array) -> jax.Array:
    """The input of a layer, by a name under which a policy can send it to the host."""
    return checkpoint_name(x_btM, _INPUT)


def rematerialised(fn: Callable, remat: str) -> Callable:
    """`fn` keeping for its backward pass what the policy says (`ModelConfig.remat`); also for a part of a layer."""
    if remat == "none":
        return fn
    return jax.checkpoint(fn, policy=_policy(remat), prevent_cse=False)


def _policy(remat: str) -> Callable:
    policies = jax.checkpoint_policies
    if remat == "attention":
        return policies.save_only_these_names(*SAVED_NAMES)
    if remat == "full":
        return policies.nothing_saveable
    out, lse, rounding = SAVED_NAMES
    with_attention = remat == "offload"
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(lse, rounding)
        if with_attention
        else (),  # TPU compilers fail on copies of some of its shapes
        names_which_can_be_offloaded=(_INPUT, out) if with_attention else (_INPUT,),
        offload_src="device",
        offload_dst="pinned_host",
    )
