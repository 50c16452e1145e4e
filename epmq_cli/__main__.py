"""`python -m epmq_cli` is `epmq`."""

from epmq_cli.cli import main

if __name__ == "__main__":
    main()
