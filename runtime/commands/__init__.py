"""One file a subcommand of `nuwa`: `command(parser)` adds arguments and returns what runs them."""
