"""Quantize: a model goes in, a low-bit checkpoint comes out, whole or not at all.

Everything that can be refused is refused before the first block: names, text, shapes, the output folder, a disk that
is too small. Then blocks are solved one by one. Each is saved when it is finished, as a shard of the checkpoint, in a
work folder beside the output; a run that ends early resumes from there. At the end the shards become the output.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sarqc.checkpoint.folders import check_existing
from sarqc.checkpoint.side_files import side_files
from sarqc.checkpoint.verify import check_finite, check_fp16_range
from sarqc.config import (
    AUTO,
    DEFAULT_METHOD,
    QUANTIZE,
    CalibrationConfig,
    Configs,
    MethodConfig,
    QuantConfig,
    RunConfig,
)
from sarqc.errors import ArgumentError, Interrupted, ResourceError, opening_line, out_of_memory
from sarqc.estimation import preflight
from sarqc.estimation.memory import estimate_memory
from sarqc.keywords import QuantizeKeywords
from sarqc.model import dataset
from sarqc.model.in_memory import is_name, model_name, saved
from sarqc.options import documented, with_alias
from sarqc.pipeline import driver
from sarqc.pipeline.activation_memory import suspended_memory
from sarqc.pipeline.bit_allocation import BitAllocation, allocate_bits
from sarqc.pipeline.comm import SINGLE_PROCESS, Comm
from sarqc.pipeline.distributed import Following, check_ranks_agree, named, process_group, start_everywhere
from sarqc.pipeline.driver import Start
from sarqc.pipeline.execution import Execution
from sarqc.pipeline.fingerprint import fingerprint
from sarqc.pipeline.plan import Plan, make_plan, read_windows
from sarqc.pipeline.progress import NoProgress, Progress
from sarqc.pipeline.resume import WorkFolder, begin, recorded, work_place
from sarqc.pipeline.write import tensors_of_block, write_checkpoint
from sarqc.report.result import Result
from sarqc.system import resolve_dtype, trim_host_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@with_alias(watcher="progress")
@documented(*QUANTIZE)
def quantize(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    method: str | MethodConfig = DEFAULT_METHOD,
    quant: QuantConfig | None = None,
    calibration: CalibrationConfig | None = None,
    run: RunConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    **options: Unpack[QuantizeKeywords],
) -> Result:
    """Quantize a causal language model to a checkpoint in the folder `out`. An interrupted run resumes.

    Options are fields of `QuantConfig`, `MethodConfig`, `CalibrationConfig` and `RunConfig`: give the configurations,
    their fields as keywords, or both. A keyword changes the field of a configuration.

    Under torchrun all ranks call this alike. Sequences and matrices are split over them, rank 0 writes, and all return
    its result.

    In Python `dataset` also takes a list of texts, a list of conversations (lists of {"role", "content"}, to which the
    model's chat template is applied), a `datasets.Dataset` with a column "text", "messages", "conversations" or
    "input_ids", and token ids, int64 [sequences, tokens].

    A model in memory is saved beside `out` first, for the time of the run, which does not resume.

    Args:
        model: Local folder, hub id, "smollm2" (the packaged model), or a loaded transformers model.
        out: Folder to write. It must not exist, unless `overwrite`.
        quant: Number format of the weights.
        calibration: Calibration data.
        run: Device, budgets, work folder.
        tokenizer: Tokenizer of a model in memory; it is saved with the result.
        progress: Receives the progress of the run.
        {options}

    Returns:
        The output folder, sizes, errors, and every layer.

    Raises:
        SarqcError: Anything wrong with the input, before `out` exists.
        Interrupted: `progress` asked the run to stop; finished blocks are saved.
    """
    configs = Configs.of(quant, method, calibration, run, **options)
    out, own = Path(out).expanduser(), configs.run
    named_model = is_name(model)
    if named_model and tokenizer is not None:
        raise ArgumentError("tokenizer is for a model in memory: a folder or a hub model has its own; leave it out")
    with process_group(own.device, ordered=own.ordered) as (comm, own_device):
        check_existing(out, own.overwrite)
        configs, progress = replace(configs, run=replace(own, device=own_device)), progress or NoProgress()
        if named_model:
            return _execute(make_plan(model, configs), out, comm, progress)
        if comm.size > 1:
            raise ArgumentError("model is in memory: with several ranks save it first, and give the folder")
        return _from_memory(model, tokenizer, out, configs, progress)


def _from_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path, configs: Configs, progress: Progress
) -> Result:
    """Quantize a model in memory. Its checkpoint and the work folder are temporary: nothing says that a model of the
    same shape is the same model, so nothing is resumed."""
    with saved(model, tokenizer, out.parent) as folder:
        work = configs.run.work_dir or folder.parent / "work"
        configs = replace(configs, run=replace(configs.run, work_dir=work, resume=False))
        plan = replace(make_plan(folder, configs), model=model_name(model))
        try:
            return _execute(plan, out, SINGLE_PROCESS, progress)
        except Interrupted as error:
            raise Interrupted("stopped; a run of a model in memory does not resume") from error


def _execute(plan: Plan, out: Path, comm: Comm, progress: Progress) -> Result:
    """Run a plan on this rank."""
    place = work_place(out, plan.run.work_dir, plan.folder)
    plan = _with_dtype(plan, place, comm)
    windows = read_windows(plan)
    run = _Run(plan, windows, place, comm, progress if comm.rank == 0 else Following(progress))
    check_ranks_agree(comm, run.fingerprint)
    if comm.rank > 0:
        run.solve_blocks(None)
        return run.shared(None)
    run.estimate_run(out)
    with begin(place, run.fingerprint, _about(plan, windows), restart=not plan.run.resume) as opened:
        return run.shared(run.lead(opened, out))


def _with_dtype(plan: Plan, place: Path, comm: Comm) -> Plan:
    """The plan with the dtype of rank 0 where it was measured; a run that is resumed keeps what it was begun with."""
    if plan.run.dtype != AUTO or plan.device.type != "cpu" or not plan.method.calibrated:
        return plan
    begun = recorded(place, "dtype") if plan.run.resume and comm.rank == 0 else None
    name: Any = comm.all_gather_object(begun or str(plan.dtype).removeprefix("torch."))[0]
    return replace(plan, dtype=resolve_dtype(name, plan.device, plan.dtype), run=replace(plan.run, dtype=name))


def _about(plan: Plan, windows: dataset.Windows | None) -> dict[str, Any]:
    """What the report needs to know of a run, beside its fingerprint."""
    return {
        "model": plan.model,
        "folder": str(plan.folder.resolve()),
        "blocks": len(plan.lazy.units),
        "targets": plan.targets.record(),
        "calibration": None
        if windows is None
        else windows.record() | {"seed": plan.calibration.seed, "column": plan.calibration.column},
        "device": str(plan.device),
        "dtype": plan.run.dtype,
        "code": plan.run.trust_remote_code,
        "effort": plan.method.effort,
    }


class _Run:
    """A run on one rank."""

    def __init__(
        self, plan: Plan, windows: dataset.Windows | None, place: Path, comm: Comm, progress: Progress
    ) -> None:
        self.plan = plan
        self.tokens = None if windows is None else windows.tokens
        self.place = place
        self.fingerprint = fingerprint(plan, windows)
        self.comm = comm
        self.progress = progress
        self.at = -1  # the block at work

    def estimate_run(self, out: Path) -> None:
        """The preflight: `SarqcError` where the run must not begin, or could not end."""
        side_files(self.plan.folder, self.plan.run.trust_remote_code)
        check_finite(self.plan.checkpoint, f"{self.plan.lazy.prefix}.")
        check_fp16_range(self.plan.checkpoint, self.plan.dtype)
        result = preflight.estimate_run(self.plan, None if self.tokens is None else self.tokens.shape, out, self.place)
        for note in (*result.notes, result.headline()):
            self.progress.note(note)
        result.refuse()

    def lead(self, work: WorkFolder, out: Path) -> Result:
        """What rank 0 does: all blocks, then the checkpoint, and then the work folder goes."""
        self.solve_blocks(work)
        self.progress.note("writing and checking the checkpoint")
        result = write_checkpoint(work, self.plan.checkpoint, out, self.plan.format, overwrite=self.plan.run.overwrite)
        work.remove()
        return result

    def shared(self, result: Result | None) -> Result:
        """Rank 0's result on every rank, once it is there."""
        with named(self.comm, lambda: "waiting for the checkpoint"):
            leader = self.comm.all_gather_object(result)[0]
        assert leader is not None
        return leader

    def solve_blocks(self, work: WorkFolder | None) -> None:
        """Finish every block that is not finished yet; rank 0, which has the work folder, saves each."""
        with named(self.comm, lambda: f"block {self.at + 1}" if self.at >= 0 else "before the first block"):
            start = start_everywhere(self.comm, self._begin(work) if work else None)
            if start.block == len(self.plan.lazy.units):
                return
            try:
                self._each_block(start, work)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = opening_line(error)
                raise ResourceError(
                    f"{self.plan.device} has too little memory for one block ({reason}): use a larger one or "
                    "--device cpu; finished blocks are kept in the work folder"
                ) from error

    def _begin(self, work: WorkFolder) -> Start:
        start, trouble = work.start(self.plan.lazy.passed if self.plan.method.calibrated else 0)
        if trouble:
            self.progress.note(f"{trouble}; resuming from the last valid block")
        if start.block:
            self.progress.note(f"resuming at block {start.block + 1} of {work.blocks}, from {work.folder}")
        self.progress.begin_blocks(work.blocks, start.block)
        return start

    def _stage(self, block: int, name: str) -> None:
        self.at = block
        self.progress.stage(block, name)

    def _widths(self, work: WorkFolder | None) -> dict[str, int] | None:
        """Bits of every Linear where they differ: as the work folder has them, or chosen now."""
        if self.plan.quant.avg_bits is None:
            return None
        chosen: BitAllocation | None = self.comm.all_gather_object(work.bit_widths() if work else None)[0]
        if chosen is None:
            assert self.tokens is not None
            self.progress.note("measuring the sensitivity of every site, to allocate bits")
            chosen = allocate_bits(self.plan, self.tokens, self.comm, self._stage)
            if work:
                work.save_bit_allocation(chosen)
        self.progress.note(chosen.headline())
        return chosen.by_linear()

    def _each_block(self, start: Start, work: WorkFolder | None) -> None:
        plan, count = self.plan, len(self.plan.lazy.units)
        bit_widths = self._widths(work)
        windows, seqlen = (0, 0) if self.tokens is None else self.tokens.shape
        waiting, _ = estimate_memory(plan, windows, seqlen, self.comm.size)
        began = time.perf_counter()
        running = driver.run(
            plan.lazy,
            plan.checkpoint,
            self.tokens,
            plan.quant,
            plan.method,
            Execution(
                device=plan.device,
                dtype=plan.dtype,
                micro_batch=plan.run.micro_batch,
                gram_budget=plan.run.gram_budget,
                comm=self.comm,
                memory=suspended_memory(plan, -(-windows // self.comm.size) * seqlen, self.place),
                prefetch=waiting.prefetched > 0,
                bit_widths=bit_widths,
                on_progress=self._stage,
            ),
            start,
        )
        with closing(running):  # its thread ends here, however this ends
            for result in running:
                now = time.perf_counter()
                due = work is not None and (work.states_due() or self.progress.stop_requested())
                if not self.comm.all_gather_object(due)[0]:
                    result = replace(result, stored_states=None)
                if work:
                    work.save(result, now - began, tensors_of_block(plan.lazy, plan.checkpoint, result.index))
                elif result.stored_states:
                    deque(result.stored_states.hidden.each(), maxlen=0)  # they go to rank 0, which saves them
                trim_host_memory()
                began = now
                for note in result.notes:
                    self.progress.note(note)
                self.progress.block(result)
                if result.index + 1 < count and any(self.comm.all_gather_object(self.progress.stop_requested())):
                    raise Interrupted(
                        f"stopped after block {result.index + 1} of {count}, which is saved"
                        f"{f' in {work.folder}' if work else ''}: rerun the command to resume"
                    )
