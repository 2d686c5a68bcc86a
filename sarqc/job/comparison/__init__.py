"""Methods side by side: `compare` says what to measure, `bench` measures it, `store` keeps it, `table` shows it."""
