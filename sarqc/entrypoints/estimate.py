"""A dry run: what `sarqc.quantize` would do and take, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from sarqc.checkpoint.side_files import side_files
from sarqc.config import DEFAULT_METHOD, QUANTIZE, CalibrationConfig, Configs, MethodConfig, QuantConfig, RunConfig
from sarqc.estimation.preflight import Preflight, estimate_run
from sarqc.keywords import QuantizeKeywords
from sarqc.options import documented
from sarqc.pipeline.plan import expected_windows, make_plan
from sarqc.pipeline.resume import work_place


@documented(*QUANTIZE)
def estimate(
    model: str | Path,
    out: str | Path = "out",
    *,
    method: str | MethodConfig = DEFAULT_METHOD,
    quant: QuantConfig | None = None,
    calibration: CalibrationConfig | None = None,
    run: RunConfig | None = None,
    **options: Unpack[QuantizeKeywords],
) -> Preflight:
    """What `sarqc.quantize` with these arguments would do, without doing it.

    Args:
        model: As in `sarqc.quantize`. Of a hub model only headers are fetched; a folder needs no weights.
        out: The output folder.
        quant: Number format of the weights.
        calibration: Calibration data.
        run: Device, budgets, work folder.
        {options}

    Returns:
        Sizes, times and runtimes; what this machine lacks is in `problems`.

    Raises:
        SarqcError: The options do not fit the model.
    """
    configs = Configs.of(quant, method, calibration, run, **options)
    plan = make_plan(model, configs, headers_only=True)
    out = Path(out).expanduser()
    place = work_place(out, configs.run.work_dir, plan.folder)
    side_files(plan.folder, configs.run.trust_remote_code)
    return estimate_run(plan, expected_windows(plan), out, place)
