"""3DTRL: tokens at places in space (NeurIPS 2022, 2206.11895)."""
