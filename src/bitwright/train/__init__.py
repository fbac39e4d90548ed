"""Training: adapters, quantization-aware training, distillation, quantized gradients."""
