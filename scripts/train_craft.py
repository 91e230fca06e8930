"""Fine-tune a policy under a retention constraint. See the README, or --help."""

from craft_ds.cli import train_main

if __name__ == "__main__":
    train_main()
