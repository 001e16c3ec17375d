"""Transformers struggle to learn to search: graphs, a searcher and its circuits (2412.04703)."""
