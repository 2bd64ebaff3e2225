"""What the dense model does on the calibration text, recorded once."""
