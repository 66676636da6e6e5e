"""The rules: which shape of graph becomes which op. `RULES` is all of them; imports do nothing."""

from normfuse.patterns import (
    add_rms_norm,
    dual_rms_norm_add,
    dual_rms_norm_add_rms_norm,
    gated_rms_norm,
    l2_norm,
    modulated_rms_norm,
    qk_rms_norm,
    qk_rms_norm_rope,
    rms_norm,
    rms_norm_add,
    rms_norm_add_rms_norm,
    rms_norms,
    rope,
)

# Each takes what the other leaves.
RECOGNISE = (rms_norm.RULE, l2_norm.RULE)

# Each rule builds on the results of those before it, so that every chain ends as long as it can: a
# sandwich is a `rms_norm_add` that a norm follows. The heads of an attention come first, before
# `rms_norms` would take k and v where they are one tensor. `dual_rms_norm_add` comes before
# `rms_norm_add`, which would take one of the two norms with the sum of both. `rms_norms` takes all
# norms of a value before a chain takes one of them for itself. `add_rms_norm` comes last, because
# it takes any sum that is still there; a norm after RoPE, whose input is a sum, is taken before.
#
# A gate or a modulation around a norm saves more than the sum before it, so they come early, too.
COMPOSE = (
    qk_rms_norm_rope.RULE,
    gated_rms_norm.RULE,
    modulated_rms_norm.RULE,
    dual_rms_norm_add.RULE,
    rms_norm_add.RULE,
    rms_norms.RULE,
    dual_rms_norm_add_rms_norm.RULE,
    rms_norm_add_rms_norm.RULE,
    qk_rms_norm.RULE,
    add_rms_norm.RULE,
)

# What is left has no norm. It comes after them: a norm takes the embedding behind it.
TURN = (rope.RULE,)

RULES = (*RECOGNISE, *COMPOSE, *TURN)

__all__ = ["COMPOSE", "RECOGNISE", "RULES", "TURN"]
