"""`python -m tokenwire`, the same as the `tokenwire` command."""

from tokenwire.cli.main import main

if __name__ == "__main__":
    main()
