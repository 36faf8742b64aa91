"""Teacher-guided training on letters and digits of many typefaces, from end to end."""
