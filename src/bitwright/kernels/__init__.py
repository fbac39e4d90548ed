"""Products of quantized matrices."""
