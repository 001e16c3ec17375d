"""Weights from elsewhere: files of tensors, layouts of names, Hugging Face, authors."""
