"""Export a checkpoint as a policy directory that stock LeRobot loads. See --help."""

from craft_ds.cli import export_main

if __name__ == "__main__":
    export_main()
