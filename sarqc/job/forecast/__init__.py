"""Before a run: `preflight` says it all. `estimate` counts bytes on disk and seconds, `memory` what is held at once and
what waits, both from `shapes`; `serve` has the servers' rules, and `served` asks them."""
