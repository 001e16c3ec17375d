"""What the recipes of several papers begin with: models and data by the fields of a config."""
