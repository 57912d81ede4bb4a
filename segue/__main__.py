"""`python -m segue` is the command `segue`."""

from segue.jobs.cli import main

if __name__ == "__main__":
    main()
