"""What survives a restart: which adapters were loaded, pinned and aliased, and the files of their versions."""
