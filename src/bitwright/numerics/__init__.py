"""Numbers: formats, granularity, grids, range setting, packing, and the theory of their error. Torch only."""
