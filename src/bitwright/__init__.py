"""bitwright: LLM compression with proof."""
