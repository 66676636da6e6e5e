"""The rules: which shape of graph becomes which op. `RULES` is all of them; imports do nothing."""

from normfuse.patterns import (
    add_rms_norm,
    gated_rms_norm,
    l2_norm,
    modulated_rms_norm,
    rms_norm,
    rms_norm_add,
    rms_norm_add_rms_norm,
)

# Each takes what the other leaves.
RECOGNISE = (rms_norm.RULE, l2_norm.RULE)

# Each rule builds on the results of those before it, so that every chain ends as long as it can: a
# sandwich is a `rms_norm_add` that a norm follows. `add_rms_norm` comes last, because it takes any
# sum that is still there.
# A gate or a modulation around a norm saves more than the sum before it, so it comes first.
COMPOSE = (
    gated_rms_norm.RULE,
    modulated_rms_norm.RULE,
    rms_norm_add.RULE,
    rms_norm_add_rms_norm.RULE,
    add_rms_norm.RULE,
)

RULES = (*RECOGNISE, *COMPOSE)

__all__ = ["COMPOSE", "RECOGNISE", "RULES"]
