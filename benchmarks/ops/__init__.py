"""What is measured: for each operation its shapes with a reason, its least work, our implementations and the rivals.

`base` has the four nouns (a `Point` is a shape, a `Contender` is one way to compute it, an `Op` has both, a `Roof` is
what the machine can do); `gram`, `columns`, `w4a16` and `moe` fill them in. A rival is a `Contender` like any other:
one that cannot run says why, and the run lists it with that reason.
"""

from __future__ import annotations

from benchmarks.ops import columns, gram, moe, w4a16
from benchmarks.ops.base import Op

OPS: dict[str, Op] = {op.name: op for op in (gram.OP, columns.OP, w4a16.OP, moe.OP)}
