"""Distillation of a language model on text that every Python installation has."""
