"""Checkpoints, structure and streaming of transformers models."""
