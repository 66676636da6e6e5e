"""Gradients of the end of a layer with two branches and of the norm of that: the same kernel.

    grad = norm'(grad_y * (weight_4 + offset_4); total) + grad_total

is the gradient of the sum with which that of `dual_rms_norm_add` begins.
"""

from normfuse.ops.kernels.dual_rms_norm_add_backward import launch

__all__ = ["launch"]
