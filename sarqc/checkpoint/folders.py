"""An output folder that appears whole or not at all, and never on top of its source."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sarqc.checkpoint.files import sync
from sarqc.errors import CheckpointError


def check_place(out: Path | str, what: str = "output folder") -> None:
    """`CheckpointError` where no folder can be made: a name that none can have, or no right to write there."""
    path = Path(out).resolve()
    hidden = path.with_name(f".{path.name}.{'0' * 8}.partial") if path.name else path  # the longest name used beside it
    try:
        os.fspath(hidden).encode("utf-8")
        for place in (hidden, path):
            with suppress(FileNotFoundError, NotADirectoryError):
                place.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its name is not UTF-8"
        raise CheckpointError(f"{what} {_short(out)} cannot be used ({reason}): choose another one") from error
    above = next(place for place in (path.parent, *path.parents) if place.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{what} {_short(out)} cannot be made: no right to write in {above}; choose another one")


def _short(name: Path | str) -> str:
    text = repr(str(name))
    return text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}"


def check_overlap(out: Path | str, source: Path | str, what: str = "output folder") -> None:
    """`CheckpointError` if `out` is the folder `source`, lies inside it, or holds it; links are followed first."""
    real_out, real_source = Path(out).resolve(), Path(source).resolve()
    for inner, outer, how in ((real_out, real_source, "is inside"), (real_source, real_out, "holds")):
        for place in (inner, *inner.parents):
            if place.exists() and outer.exists() and place.samefile(outer):
                how = "is" if inner == place else how
                raise CheckpointError(f"{what} {out} {how} the model's own folder {source}: choose another one")


def check_existing(out: Path | str, overwrite: bool = False) -> None:
    """`CheckpointError` if a checkpoint must not be put at `out`; called before long work and again at its start.

    An empty folder may be filled. With `overwrite`, a folder that holds a checkpoint may be replaced; one without a
    config.json is left alone even then, so that a mistyped path deletes no files.
    """
    path = Path(out)
    check_place(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"output folder {out} is a file: choose another name")
    if path.is_mount():  # a checkpoint is built beside its place and renamed to it
        raise CheckpointError(f"output folder {out} is a mount point, and cannot be replaced: give a folder inside it")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"output folder {out} exists and is not empty: choose another one, or --overwrite")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"output folder {out} holds no checkpoint (no config.json) and is not overwritten")


@contextmanager
def atomic_folder(
    out: Path | str, overwrite: bool = False, token: str | None = None, within: Path | None = None
) -> Iterator[Path]:
    """A fresh hidden folder beside `out`, which becomes `out` when the block ends well and vanishes when it does not.

    An old folder at `out` is replaced (only with `overwrite`) at the very end: a failed run leaves it as it was. All
    files are on disk before the new folder has its name.
    token: of the hidden folder's name, random by default. With a fixed one, what an earlier attempt
    left when it was killed is cleared away, and what it had moved aside is put back.
    within: the place of the fresh folder instead, where it can be renamed from there to `out`: on the same file system.
    It belongs to the caller, and stays as it is where the block fails.
    """
    target = Path(out).resolve()  # a link keeps pointing at the folder it points at
    if token is not None:
        _clear_remains(target, token)
    check_existing(out, overwrite)
    token = token or secrets.token_hex(4)
    building = target.with_name(f".{target.name}.{token}.partial")
    made = [place for place in target.parents if not place.exists()]
    finished = False
    try:
        with _disk(target):
            building.mkdir(parents=True)
            built = building if within is None else _moved(building, within)
        yield built
        with _disk(target):
            for path in (*built.rglob("*"), built):
                sync(path)
            _move_into_place(built, target, target.with_name(f".{target.name}.{token}.old"), overwrite)
            sync(target.parent)
        finished = True
    finally:
        if not finished:
            shutil.rmtree(building, ignore_errors=True)
            for place in made:  # deepest first
                with suppress(OSError):  # not empty: someone else uses it by now
                    place.rmdir()


def _moved(folder: Path, place: Path) -> Path:
    """The empty `folder` under the name `place`, or as it is where the two are on different file systems."""
    try:
        return folder.rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return folder


def _move_into_place(building: Path, target: Path, aside: Path, overwrite: bool) -> None:
    """Renames `building` to `target`; an old `target` is moved aside first and deleted last."""
    check_existing(target, overwrite)  # someone may have put something there in the meantime
    if not target.exists():
        building.rename(target)
        return
    target.rename(aside)
    try:
        building.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _clear_remains(target: Path, token: str) -> None:
    """Undo what an attempt that was killed left under `token`."""
    aside = target.with_name(f".{target.name}.{token}.old")
    with _disk(target):
        if aside.exists() and not target.exists():
            aside.rename(target)
        for path in (aside, target.with_name(f".{target.name}.{token}.partial")):
            if path.exists():
                shutil.rmtree(path)


@contextmanager
def _disk(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"output folder {target} cannot be made: {error.strerror or error}") from error
