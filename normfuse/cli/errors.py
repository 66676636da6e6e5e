"""What the user of the command line can put right."""

from __future__ import annotations


class UsageError(Exception):
    """Ends the command with exit status 2: what must hold, what came, what to do."""
