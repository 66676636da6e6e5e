"""Two norms, their sum, a norm, the residual sum and the norm of that: the kernel of the dual sum.

    y = total * rstd_4 * (weight_4 + offset_4)

Backward: that of `rms_norm` for y, added to grad_total, then that of `dual_rms_norm_add`.
"""

from normfuse.ops.kernels.dual_rms_norm_add import launch

__all__ = ["launch"]
