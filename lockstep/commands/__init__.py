"""The subcommands of `lockstep`, a module a subject; heavy imports stand inside the functions."""
