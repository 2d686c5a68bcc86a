"""How help is laid out: a switch shows no type, and a long list of options stands in panels by what they are about.

Commands share options, and a panel is a matter of the list that an option stands in; so both are set on the commands,
not where options are declared.
"""

from __future__ import annotations

from typer.core import TyperGroup, TyperOption

LONG = 15
"""Options from which on a command shows them in panels."""

PANELS: dict[str, str] = {
    **dict.fromkeys(
        ("method", "methods", "bits", "avg_bits", "bits_choices", "group_size", "sym", "ignore", "also"), "Weights"
    ),
    **dict.fromkeys(("calib", "num_samples", "seqlen", "seed", "seeds"), "Calibration text"),
    **dict.fromkeys(("text", "eval_seqlen", "eval_windows"), "Text to judge on"),
    **dict.fromkeys(("strength", "saliency", "borrow", "gate_weight", "sweeps", "carry_error"), "Solver"),
    **dict.fromkeys(("device", "dtype", "micro_batch", "gram_budget", "state_budget", "ordered"), "Machine"),
    **dict.fromkeys(("work", "keep_work", "restart"), "Stopping and going on"),
}
"""Parameter of a command -> its panel; one that is not here stands in the first, `Options`."""


def laid_out(group: TyperGroup) -> TyperGroup:
    """The same commands, with the help of each made easy to read."""
    for command in (group, *group.commands.values()):
        for option in (param for param in command.params if isinstance(param, TyperOption)):
            if option.is_flag:
                option.metavar = ""
            if len(command.params) >= LONG:
                option.rich_help_panel = PANELS.get(option.name or "")
    return group
