"""Linears outside the decoder blocks that a pattern asks for: which are taken, and what is refused with its reason."""

from __future__ import annotations

import pytest

from sarqc.config import QuantConfig
from sarqc.errors import ArgumentError
from sarqc.model.layers import check_group_size, pattern_of, targets, targets_of
from tests.support import families

QUANT = QuantConfig(group_size=32)


def included(lazy, *patterns, ignore=()):
    return targets(lazy, QuantConfig(group_size=32, include=patterns, ignore=ignore))


def test_a_head_is_the_unit_behind_the_blocks(tiny):
    lazy = tiny("qwen2").lazy()
    plain, selected = targets(lazy, QUANT), included(lazy, "lm_head")
    head = selected.selected[-1]
    assert (head.linear, head.block, selected.included) == ("lm_head", len(lazy.blocks), ("lm_head",))
    assert selected.selected[:-1] == plain.selected and "lm_head" not in selected.unquantized
    assert plain.included == () and "lm_head" in plain.unquantized
    assert targets_of(lazy, selected.linears).selected == selected.selected


def test_both_names_of_a_head_find_it(tmp_path):
    lazy = families.lazy(families.save("gpt_neox", tmp_path / "model"))
    for name in ("lm_head", "embed_out"):
        selected = included(lazy, f"^{name}$")
        assert (selected.selected[-1].linear, selected.included) == ("embed_out", ("lm_head",))
        assert not {"lm_head", "embed_out"} & set(selected.unquantized)


def test_an_embedding_is_the_last_unit(tiny):
    lazy = tiny("qwen2").lazy()
    selected = included(lazy, "embed", "lm_head")
    head, embedding = selected.selected[-2:]
    assert selected.included == ("lm_head", "model.embed_tokens")
    assert (embedding.block, embedding.embedding, head.embedding) == (len(lazy.blocks) + 1, True, False)
    assert targets_of(lazy, selected.linears).selected == selected.selected
    lazy.included = selected.included
    assert (lazy.passed, len(lazy.units)) == (len(lazy.blocks) + 1, len(lazy.blocks) + 2)


def test_embeddings_of_positions_are_taken_where_text_is_known_to_pass_them(tmp_path):
    lazy = families.lazy(families.save("opt", tmp_path / "model", tie_word_embeddings=False))
    chosen = [one.linear for one in included(lazy, "embed_").selected if one.embedding]
    assert chosen == ["model.decoder.embed_tokens", "model.decoder.embed_positions"]
    lazy.__dict__["usage"] = None  # as of a model whose code does not run without data
    with pytest.raises(ArgumentError, match=r"embed_positions, which .* does not run without data"):
        included(lazy, "embed_")


def test_ignore_wins_over_include(tiny):
    selected = included(tiny("qwen2").lazy(), "lm_head", ignore=("head",))
    assert ("lm_head", "head") in selected.ignored and selected.included == ()


def test_layers_behind_the_blocks_stand_in_the_order_of_text(tmp_path):
    """OPT projects what leaves its blocks, and what enters them."""
    source = families.save("opt", tmp_path / "model", word_embed_proj_dim=32, tie_word_embeddings=False)
    lazy = families.lazy(source)
    selected = included(lazy, "lm_head", "project_out")
    assert selected.included == ("model.decoder.project_out", "lm_head")
    assert [target.block - len(lazy.blocks) for target in selected.selected[-2:]] == [0, 1]
    with pytest.raises(
        ArgumentError, match=r"project_in, which .* text does not pass through it behind the last block"
    ):
        included(lazy, "project_in")


@pytest.mark.parametrize(
    ("row", "pattern", "message"),
    [
        ("llama", "lm_head", r"lm_head, which cannot be quantized: its weight is that of model\.embed_tokens too"),
        ("llama", "embed", r"model\.embed_tokens, which cannot be quantized: its weight is that of lm_head too"),
        ("qwen2", "q_proj", r"'q_proj' finds no .* outside the decoder blocks, .* is lm_head, model\.embed_tokens"),
        ("llama", "lm_haed", r"'lm_haed' finds no Linear .* included is nothing in this model"),
    ],
)
def test_what_cannot_be_included_is_refused_by_name(tiny, row, pattern, message):
    with pytest.raises(ArgumentError, match=message):
        included(tiny(row).lazy(), pattern)


def test_a_tower_that_text_does_not_pass_is_refused(tmp_path):
    lazy = families.lazy(families.save("qwen2_vl+vl", tmp_path / "model"))
    with pytest.raises(ArgumentError, match=r"visual.*cannot be quantized: text does not pass through it"):
        included(lazy, "visual")


def test_a_head_too_narrow_for_a_group_is_named_with_the_pattern_that_leaves_it(tiny):
    lazy = tiny("qwen2").lazy()
    selected = included(lazy, "lm_head")
    with pytest.raises(ArgumentError, match="does not divide the 64 inputs of"):
        check_group_size(selected, QuantConfig(group_size=48))
    pattern = pattern_of(selected.selected[-1:])
    assert included(lazy, "lm_head", ignore=(pattern,)).ignored == (("lm_head", pattern),)


def test_average_bits_have_no_place_for_a_head():
    with pytest.raises(ArgumentError, match=r"include = .*lm_head.* and avg_bits = 4 exclude each other"):
        QuantConfig(avg_bits=4, include=("lm_head",))
