"""``python -m distloop``, which is what launchers start."""

from distloop.cli import main

if __name__ == "__main__":
    main()
