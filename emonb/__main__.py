"""`python -m emonb`."""

from emonb.cli import main

if __name__ == "__main__":
    main()
