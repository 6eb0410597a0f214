"""Learned rounding and scales, unit by unit (AdaRound, BRECQ)."""
