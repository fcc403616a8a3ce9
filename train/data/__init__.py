"""Sources of training and evaluation data, each a folder in or a seed in, a dataset artefact out."""
