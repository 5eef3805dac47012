"""Statistics of a model on its task, one file each; pruning scores, roundings and allocators ask for them by name."""
