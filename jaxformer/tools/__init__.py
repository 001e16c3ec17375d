"""What is done to checkpoints: opened, examined, imported, exported, converted."""
