"""Call a model in eval mode, as often as needed, and leave it as it was."""
