"""`python -m qguard_edge` is `qguard-edge`."""

from qguard_edge.cli import main

if __name__ == "__main__":
    main()
