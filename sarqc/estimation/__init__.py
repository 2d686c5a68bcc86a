"""Before a run: `preflight` says it all.

`sizes` counts bytes on disk and seconds, `memory` what is held at once; both read `shapes`.
"""
