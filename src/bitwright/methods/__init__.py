"""Ways of choosing codes."""
