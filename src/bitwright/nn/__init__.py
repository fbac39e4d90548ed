"""Modules that compute with quantized weights."""
