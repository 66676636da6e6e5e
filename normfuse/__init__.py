"""normfuse: a torch.compile backend that fuses the chains around RMSNorm of unmodified models."""

from importlib.metadata import PackageNotFoundError, version

from normfuse import testing
from normfuse.backend import options
from normfuse.checks import CheckReport, check_report, reset_checks
from normfuse.explain import assert_fused, explain
from normfuse.ops import (
    AddRMSNorm,
    DualRMSNormAddRMSNorm,
    Gating,
    Modulation,
    QKRMSNorm,
    RMSNormAddRMSNorm,
    RoPE,
    RoundingPlan,
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
from normfuse.ops.checking import CheckedSite, Violation
from normfuse.report import Report, Site

try:
    __version__ = version("normfuse")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AddRMSNorm",
    "CheckReport",
    "CheckedSite",
    "DualRMSNormAddRMSNorm",
    "Gating",
    "Modulation",
    "QKRMSNorm",
    "RMSNormAddRMSNorm",
    "Report",
    "RoPE",
    "RoundingPlan",
    "Site",
    "Violation",
    "add_rms_norm",
    "assert_fused",
    "check_report",
    "dual_rms_norm_add",
    "dual_rms_norm_add_rms_norm",
    "explain",
    "gated_rms_norm",
    "l2_norm",
    "modulated_rms_norm",
    "options",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "reset_checks",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_rms_norm",
    "rms_norms",
    "rope",
    "testing",
]
