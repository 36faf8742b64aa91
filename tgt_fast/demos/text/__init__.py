"""What the demos on text share: a pretrained sentence encoder, a vocabulary, a small generator of texts."""
