"""``python -m dmixed`` is the command ``dmixed``."""

from dmixed.cli import main

if __name__ == "__main__":
    main()
