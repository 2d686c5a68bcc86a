"""Methods side by side: `experiment` measures a cell, `store` keeps it, `table` shows it."""
