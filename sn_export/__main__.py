"""``python -m sn_export`` is ``sn-export``."""

from .cli import main

if __name__ == "__main__":
    main()
