"""Write docs/img/*.svg."""

from pathlib import Path

from docs.draw import PICTURES

for name, draw in PICTURES.items():
    path = Path(__file__).parents[1] / "img" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    path.write_text(draw(), encoding="utf-8")
