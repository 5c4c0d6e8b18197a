"""The `tokenwire` command: one file a subcommand, each a thin layer over the client, the service or the engine."""
