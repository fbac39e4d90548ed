"""LoRA around dense and packed layers, the ledger of what is trained, and starts at the error of quantization."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from bitwright.errors import RecipeError, ShapeError, StructureError
from bitwright.model.layouts import own
from bitwright.nn.linear import QuantizedLinear
from bitwright.numerics.fitting import fit
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.low_rank import nearest_low_rank, output_error
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scales import FloatScale
from bitwright.schemes import Scheme
from bitwright.train.lora import (
    LoraConfig,
    LoraLinear,
    ParameterCount,
    adapters_of,
    add_adapters,
    merged,
    remove_adapters,
    trainable_ledger,
)
from bitwright.train.low_rank_start import start_at_error
from bitwright.train.target_layers import block_layers, stacked_experts
