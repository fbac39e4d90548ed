"""The table of ways to store scales."""

from bitwright.numerics.block_scales import E8M0Scale, Fp8Scale
from bitwright.numerics.nested import NestedScale
from bitwright.numerics.scales import MIN_SCALE, FloatScale, ScaleFormat
from bitwright.registry import Registry

SCALE_FORMATS: Registry[ScaleFormat] = Registry("scale format")
for _format in (*map(FloatScale, MIN_SCALE), E8M0Scale(), E8M0Scale(exponent_offset=6), Fp8Scale(), NestedScale()):
    SCALE_FORMATS.register(_format.name, _format)
