"""The networks that images are compared by."""
