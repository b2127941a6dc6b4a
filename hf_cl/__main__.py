"""`python -m hf_cl` is `hf-cl`."""

from hf_cl.cli import main

if __name__ == "__main__":
    main()
