"""Teacher-guided training on scikit-learn's digits, from end to end."""
