"""`python -m mae COMMAND` is `mae COMMAND`."""

from mae.cli import main

if __name__ == "__main__":
    main()
