"""How the shipped miniature was trained."""
