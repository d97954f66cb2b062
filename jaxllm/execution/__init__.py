"""What touches devices: packing a plan into a batch, the compiled steps, sampling, the runner."""
