"""The ops of namespace `normfuse::`, their meaning in plain torch, and their eager functions."""

from normfuse.ops.add_rms_norm import ADD_RMS_NORM, AddRMSNorm, add_rms_norm
from normfuse.ops.gated_rms_norm import GATED_RMS_NORM, gated_rms_norm
from normfuse.ops.gating import Gating
from normfuse.ops.l2_norm import L2_NORM, l2_norm
from normfuse.ops.modulated_rms_norm import MODULATED_RMS_NORM, modulated_rms_norm
from normfuse.ops.modulation import Modulation
from normfuse.ops.rms_norm import RMS_NORM, rms_norm
from normfuse.ops.rms_norm_add import RMS_NORM_ADD, rms_norm_add
from normfuse.ops.rms_norm_add_rms_norm import (
    RMS_NORM_ADD_RMS_NORM,
    RMSNormAddRMSNorm,
    rms_norm_add_rms_norm,
)
from normfuse.ops.rounding import RoundingPlan

__all__ = [
    "ADD_RMS_NORM",
    "GATED_RMS_NORM",
    "L2_NORM",
    "MODULATED_RMS_NORM",
    "RMS_NORM",
    "RMS_NORM_ADD",
    "RMS_NORM_ADD_RMS_NORM",
    "AddRMSNorm",
    "Gating",
    "Modulation",
    "RMSNormAddRMSNorm",
    "RoundingPlan",
    "add_rms_norm",
    "gated_rms_norm",
    "l2_norm",
    "modulated_rms_norm",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_rms_norm",
]
