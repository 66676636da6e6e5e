"""The ops of namespace `normfuse::`, their meaning in plain torch, and their eager functions."""

from normfuse.ops.add_rms_norm import ADD_RMS_NORM, AddRMSNorm, add_rms_norm
from normfuse.ops.dual_rms_norm_add import DUAL_RMS_NORM_ADD, dual_rms_norm_add
from normfuse.ops.dual_rms_norm_add_rms_norm import (
    DUAL_RMS_NORM_ADD_RMS_NORM,
    DualRMSNormAddRMSNorm,
    dual_rms_norm_add_rms_norm,
)
from normfuse.ops.gated_rms_norm import GATED_RMS_NORM, gated_rms_norm
from normfuse.ops.gating import Gating
from normfuse.ops.l2_norm import L2_NORM, l2_norm
from normfuse.ops.modulated_rms_norm import MODULATED_RMS_NORM, modulated_rms_norm
from normfuse.ops.modulation import Modulation
from normfuse.ops.qk_rms_norm import QK_RMS_NORM, QKRMSNorm, qk_rms_norm
from normfuse.ops.qk_rms_norm_rope import QK_RMS_NORM_ROPE, qk_rms_norm_rope
from normfuse.ops.rms_norm import RMS_NORM, rms_norm
from normfuse.ops.rms_norm_add import RMS_NORM_ADD, rms_norm_add
from normfuse.ops.rms_norm_add_rms_norm import (
    RMS_NORM_ADD_RMS_NORM,
    RMSNormAddRMSNorm,
    rms_norm_add_rms_norm,
)
from normfuse.ops.rms_norms import RMS_NORMS, rms_norms
from normfuse.ops.rope import ROPE, RoPE, rope
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import RoundingPlan

__all__ = [
    "ADD_RMS_NORM",
    "DUAL_RMS_NORM_ADD",
    "DUAL_RMS_NORM_ADD_RMS_NORM",
    "GATED_RMS_NORM",
    "L2_NORM",
    "MODULATED_RMS_NORM",
    "QK_RMS_NORM",
    "QK_RMS_NORM_ROPE",
    "RMS_NORM",
    "RMS_NORMS",
    "RMS_NORM_ADD",
    "RMS_NORM_ADD_RMS_NORM",
    "ROPE",
    "AddRMSNorm",
    "DualRMSNormAddRMSNorm",
    "Gating",
    "Modulation",
    "QKRMSNorm",
    "RMSNormAddRMSNorm",
    "RoPE",
    "Rotation",
    "RoundingPlan",
    "add_rms_norm",
    "dual_rms_norm_add",
    "dual_rms_norm_add_rms_norm",
    "gated_rms_norm",
    "l2_norm",
    "modulated_rms_norm",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_rms_norm",
    "rms_norms",
    "rope",
]
