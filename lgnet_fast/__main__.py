"""`python -m lgnet_fast ...`: the command line, as `accelerate launch -m lgnet_fast ...` starts it."""

from .cli import main

if __name__ == "__main__":
    main()
