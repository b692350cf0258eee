"""Models in files: model folders, training runs, published checkpoints."""
