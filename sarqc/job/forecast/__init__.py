"""Before a run: `estimate` counts bytes and seconds, `serve` who will load the result, `preflight` says it all."""
