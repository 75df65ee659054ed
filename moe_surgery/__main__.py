"""`python -m moe_surgery` is `moe-surgery`."""

from moe_surgery.cli import main

if __name__ == "__main__":
    main()
