"""What the devices at hand do, measured: `ring-attention doctor`."""
