"""``python -m distloop.native``: make the C helpers beforehand, beside their sources, for images without a compiler."""

import sys

from distloop.native import UnavailableError, make_beforehand

if __name__ == "__main__":
    try:
        for library in make_beforehand():
            print(library.name)
    except UnavailableError as failure:
        sys.exit(f"distloop: helpers cannot be made beforehand: {failure}")
