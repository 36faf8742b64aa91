"""``tgt-fast demo docstrings``: teacher-guided training on text, with a pretrained sentence encoder as the labeler."""
