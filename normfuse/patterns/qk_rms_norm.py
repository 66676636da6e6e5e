"""Norms of projections of one value, side by side  =>  normfuse::qk_rms_norm."""

from __future__ import annotations

from torch.fx import Node

from normfuse.ops import QK_RMS_NORM, RMS_NORM
from normfuse.patterns.rule import Context, Rule
from normfuse.patterns.side_by_side import Part, join, previous_part, stand_side_by_side


def _apply(node: Node, context: Context) -> Node | None:
    if node.target not in (RMS_NORM, QK_RMS_NORM):
        return None
    right, left = Part.of(node), previous_part(node)
    if left is None or right is None or left.tables or not stand_side_by_side(left, right):
        return None
    return join(left, right, context)


RULE = Rule(
    name="qk_rms_norm",
    before="q, k [, v] -> RMSNorm each, of heads or of whole projections",
    families="OLMo 2, MiniMax M2, Hunyuan and Llama 4 (after RoPE), DeepSeek's of low rank, Jamba",
    apply=_apply,
)
