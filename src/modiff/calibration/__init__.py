"""What does it learn from? Calibration data, and the learning of rounding and scales."""
