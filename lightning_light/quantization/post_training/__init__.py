"""Post-training quantization: equalization, rounding, bias correction, sensitivity, allocation of bits."""
