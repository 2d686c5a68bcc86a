"""Before a run: `estimate` counts bytes and seconds, `serve` has the servers' rules, `served` asks them,
`preflight` says it all."""
