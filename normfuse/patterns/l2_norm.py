"""x * rsqrt(sum(x^2) + eps), in any spelling, and F.normalize  =>  normfuse::l2_norm."""

from __future__ import annotations

from torch.fx import Node

from normfuse.ops.rounding import L2
from normfuse.patterns.rms_norm import find_site, read_norm, rewrite
from normfuse.patterns.rule import Context, Rule


def _apply(node: Node, context: Context) -> Node | None:
    site = find_site(node)
    norm = None if site is None else read_norm(site)
    return rewrite(norm, context) if norm is not None and norm.plan.mean == L2 else None


RULE = Rule(
    name="l2_norm",
    before="x -> L2 norm",
    families="the linear attention of Qwen3-Next, Qwen 3.5 and Kimi Linear; `F.normalize`",
    apply=_apply,
)
