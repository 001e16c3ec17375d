"""Trained Transformers Learn Linear Models In-Context (arXiv 2306.09927)."""
