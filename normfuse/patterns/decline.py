"""Why a site is left to plain Inductor: always one sentence that a user can act on."""

from __future__ import annotations


class Decline(Exception):
    """Raised inside a rule that must not rewrite; its text is the report's sentence."""
