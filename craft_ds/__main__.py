"""`python -m craft_ds` is `craft-ds`, so that launchers can start it: `torchrun … -m craft_ds train …`."""

from craft_ds.cli import main

if __name__ == "__main__":
    main()
