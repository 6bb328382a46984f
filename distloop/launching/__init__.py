"""How ranks are started: commands and files, rendered by pure functions."""
