"""Before a run: `preflight` says it all. `estimate` counts bytes on disk and seconds, `memory` what is held at once and
what waits, both from `shapes`; `serve` knows who will load the result."""
