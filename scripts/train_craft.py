"""Fine-tune a policy under a retention constraint. See the README, or --help."""

from craft_ds.cli import end_process, train_main

if __name__ == "__main__":
    end_process(train_main)
