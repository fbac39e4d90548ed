"""What the methods learn from calibration text."""
