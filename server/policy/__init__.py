"""Who may use and manage which adapter, and how much of the server each adapter gets: a TOML file of the operator."""
