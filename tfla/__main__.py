"""`python -m tfla` is the command `tfla`."""

if __name__ == "__main__":
    from tfla import signals

    signals.end_silently()
    from tfla.cli import main

    main()
