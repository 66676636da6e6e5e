"""`dual_rms_norm_add` -> RMSNorm, both used  =>  normfuse::dual_rms_norm_add_rms_norm."""

from __future__ import annotations

from torch.fx import Node

from normfuse.ops import DUAL_RMS_NORM_ADD, DUAL_RMS_NORM_ADD_RMS_NORM
from normfuse.patterns.rms_norm_add_rms_norm import norm_after_sum
from normfuse.patterns.rule import Context, Rule


def _apply(node: Node, context: Context) -> Node | None:
    return norm_after_sum(node, context, DUAL_RMS_NORM_ADD, DUAL_RMS_NORM_ADD_RMS_NORM)


RULE = Rule(
    name="dual_rms_norm_add_rms_norm",
    before="the chain of `dual_rms_norm_add` -> RMSNorm",
    families="Gemma 4's layers with experts, and the norm that begins the next layer",
    apply=_apply,
)
