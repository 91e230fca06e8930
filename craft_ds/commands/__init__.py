"""The subcommands of `craft-ds`: one module each, with `main(arguments)`. None imports torch for `--help`."""
