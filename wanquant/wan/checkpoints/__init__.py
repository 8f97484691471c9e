"""Transformers in files: quantized checkpoints, conversion from files to files, export to other engines."""
