"""How parameters are made trainable."""
