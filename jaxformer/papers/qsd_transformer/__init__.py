"""QSD-Transformer: integer spikes, few-bit weights, distilled attention (2501.13492)."""
