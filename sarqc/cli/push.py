"""`sarqc push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarqc.cli.options import JsonOption, TrustOption, loading, print_json, print_line, stderr, stdout


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `sarqc quantize` or `convert` wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, OWNER/NAME; made if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; one that exists stays as it is.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Verify a checkpoint and upload it to a hub with its card and report. The same command resumes an upload.

    The token is that of `hf auth login` or HF_TOKEN; HF_ENDPOINT names another hub.

    Example: sarqc push qwen3-8b-w4 my-name/qwen3-8b-w4 --private
    """
    from sarqc.cli.terminal import Ticker

    with loading():
        from sarqc.entrypoints.push import push as run

    with Ticker(stderr()) as ticker:
        address = run(
            checkpoint,
            repo,
            private=private or None,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=ticker.follow("tensors"),
        )
    if as_json:
        print_json({"repo": repo, "revision": revision, "commit": address})
    else:
        print_line(stdout(), f"{checkpoint}: sound, uploaded to {repo}: {address}")
