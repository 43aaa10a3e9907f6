"""`python -m tfla` is the command `tfla`."""

from tfla.cli import main

if __name__ == "__main__":
    main()
