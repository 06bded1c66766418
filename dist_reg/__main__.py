"""`python -m dist_reg` and `torchrun ... -m dist_reg` are the command line."""

from dist_reg.cli import main

if __name__ == "__main__":
    main()
