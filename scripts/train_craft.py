"""Fine-tune a policy under a retention constraint. See the README, or --help."""

from craft_ds.cli import exit_without_teardown, train_main

if __name__ == "__main__":
    exit_without_teardown(train_main)
