"""Base models: found by name, loaded from safetensors."""
