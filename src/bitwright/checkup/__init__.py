"""What is wrong with a quantized checkpoint, where, and how to mend it."""
