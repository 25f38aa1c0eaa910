"""Options: typed, checked, from flags and YAML."""
