"""L2 norm, forward: the kernel of a weightless RMSNorm whose sum of squares is not divided.

    y = x / sqrt(sum(x^2) + eps), or x / max(sqrt(sum(x^2)), eps) where the plan is bounded

Backward, with unit = x * rstd and g = grad_y:
    grad_x = rstd * (g - unit * sum(g * unit)), or rstd * g where eps is the root
"""

from normfuse.ops.kernels.rms_norm import launch

__all__ = ["launch"]
