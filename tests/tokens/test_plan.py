"""The token plan: METHOD 16's table to its printed digits, and everything that follows from it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from mv2v_engine.config import LUCY_5B, WAN_1_3B, MergerConfig, TransformerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.plan import (
    Segment,
    TokenPlan,
    latent_grid,
    memory_tokenizers,
    novel_view_plan,
    turn_plan,
    window_plan,
)

PETA = 1e15
# METHOD 16 as printed: M, tokens uniform, PFLOP, tokens dynamic, PFLOP, saved %, f, merged,
# saved %, static, static over (M = 0, dynamic)
TABLE = [
    (0, 65_520, 0.971, 65_520, 0.971, None, 0.30, 0.814, 16.1, 0.485, 0.50),
    (1, 98_280, 2.049, 73_710, 1.203, 41.3, 0.30, 0.989, 17.8, 0.535, 0.55),
    (3, 163_800, 5.394, 90_090, 1.743, 67.7, 0.46, 1.246, 28.5, 0.634, 0.65),
    (4, 196_560, 7.659, 92_274, 1.822, 76.2, 0.54, 1.224, 32.8, 0.647, 0.67),
    (6, 262_080, 13.378, 96_642, 1.986, 85.2, 0.70, 1.211, 39.0, 0.673, 0.69),
    (10, 393_120, 29.561, 105_378, 2.335, 92.1, 0.70, 1.390, 40.5, 0.726, 0.75),
    (16, 589_680, 65.706, 118_482, 2.912, 95.6, 0.70, 1.680, 42.3, 0.806, 0.83),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"M={row[0]}")
def test_reference_counts(row: tuple[float, ...]) -> None:
    memory = int(row[0])
    uniform = novel_view_plan(memory=memory, merge="off", tokenizers="uniform")
    dynamic = novel_view_plan(memory=memory, merge="off")
    merged = novel_view_plan(memory=memory)
    static = novel_view_plan(memory=memory, merge="off", conditioning="static")
    alone = novel_view_plan(memory=0, merge="off").flops()
    assert (uniform.length, round(uniform.flops() / PETA, 3)) == row[1:3]
    assert (dynamic.length, round(dynamic.flops() / PETA, 3)) == row[3:5]
    if row[5] is not None:
        assert round(100 * (1 - dynamic.flops() / uniform.flops()), 1) == row[5]
    assert merged.fraction == pytest.approx(row[6])
    assert round(merged.flops() / PETA, 3) == row[7]
    assert round(100 * (1 - merged.flops() / dynamic.flops()), 1) == row[8]
    # M = 16 is printed 0.806, the formula gives 0.8052
    assert static.flops() / PETA == pytest.approx(row[9], abs=1e-3)
    assert round(static.flops() / alone, 2) == row[10]


def test_a_plan_is_an_immutable_key() -> None:
    first, second = novel_view_plan(memory=4), novel_view_plan(memory=4)
    assert first is not second and first == second and hash(first) == hash(second)
    assert {first: "graph"}[second] == "graph"
    hash(replace(first, fraction=0.3))
    assert first != novel_view_plan(memory=4, merge="off")
    assert first != novel_view_plan(memory=3)
    with pytest.raises(FrozenInstanceError):
        first.merge = "off"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        first.segments[0].tau = 3  # type: ignore[misc]


def test_derived_values_do_not_change_a_plan() -> None:
    plan, fresh = novel_view_plan(memory=2), novel_view_plan(memory=2)
    before = hash(plan)
    plan.flops(), plan.frame_table, plan.merge_steps, plan.layout
    assert hash(plan) == before and plan == fresh


def test_a_default_fraction_equals_the_same_one_given() -> None:
    assert novel_view_plan(memory=4) == novel_view_plan(memory=4, fraction=0.54)
    assert [novel_view_plan(memory=m).fraction for m in (0, 1, 2, 5, 6, 16)] == pytest.approx(
        [0.3, 0.3, 0.38, 0.62, 0.7, 0.7]
    )
    assert novel_view_plan(memory=4, fraction=0.0).merge_steps == ()


def test_the_frame_table_partitions_the_sequence() -> None:
    plan = novel_view_plan(memory=5)
    expected_start = 0
    for index, segment in enumerate(plan.segments):
        rows = [span for span in plan.frame_table if span.segment == index]
        assert [span.frame for span in rows] == list(range(segment.num_frames))
        for span in rows:
            assert span.start == expected_start
            assert span.stop - span.start == segment.tokens_per_frame
            expected_start = span.stop
    assert expected_start == plan.length
    assert len(plan.frame_table) == 7 * 21


def test_lengths_by_kind_and_rank() -> None:
    plan = novel_view_plan(memory=5)
    target = 21 * 30 * 52
    memory = 3 * 21 * 15 * 26 + 2 * 21 * 8 * 13
    assert plan.lengths_by_kind == {"target": target, "source": target, "memory": memory}
    assert [segment.tokenizer for segment in plan.segments[2:]] == [4, 4, 4, 8, 8]
    assert [segment.role for segment in plan.segments] == ["target", "source", *["memory"] * 5]
    # 60 and 104 do not divide by 8: padded to 8 x 13 tokens
    assert plan.segments[-1].token_grid == (8, 13)


def test_merge_counts_at_both_depths() -> None:
    plan = novel_view_plan(memory=4)  # f = 0.54, 21 source frames, 63 of k=4, 21 of k=8
    first, second = plan.merge_steps
    assert (first.block, second.block) == (10, 20)
    assert [(g.num_frames, g.num_merged) for g in first.groups] == [(21, 11), (63, 34), (21, 11)]
    assert [(g.num_frames, g.num_merged) for g in second.groups] == [(10, 5), (29, 15), (10, 5)]
    assert [(g.rows, g.columns) for g in first.groups] == [(30, 52), (15, 26), (8, 13)]
    after_first = 32_760 + 10 * 1560 + 11 * 390 + 29 * 390 + 34 * 8 * 13 + 10 * 104 + 11 * 4 * 7
    after_second = 32_760 + 5 * 1560 + 16 * 390 + 14 * 390 + 49 * 8 * 13 + 5 * 104 + 16 * 4 * 7
    lengths = plan.lengths_by_block()
    assert lengths == (92_274,) * 10 + (after_first,) * 10 + (after_second,) * 10
    assert second.before == first.after and second.before.length == after_first


def test_binary_fractions_do_not_lose_a_frame() -> None:
    # 0.7 * 10 is 6.999... in floating point, its floor is meant to be 7
    plan = turn_plan(tiny_config(), (10, 4, 4), (), fraction=0.7)
    first, second = plan.merge_steps
    assert first.groups[0].num_merged == 7
    assert second.groups[0].num_merged == 2  # floor(0.7 * 3)
    for frames in range(1, 60):
        for percent in range(0, 101):
            plan = turn_plan(tiny_config(), (frames, 4, 4), (), fraction=percent / 100)
            assert plan.merge_counts(plan.layout) == (percent * frames // 100,)


def test_memory_of_the_sources_grid_shares_its_group() -> None:
    plan = turn_plan(tiny_config(), (3, 12, 20), (2, 4), fraction=0.5)
    groups = plan.layout.groups()
    assert [(group.runs, group.num_frames) for group in groups] == [((1, 2), 6), ((3,), 3)]
    step = plan.merge_steps[0]
    # the target, then for each group what is kept and what is merged
    grids = [(run.rows, run.columns, run.num_frames, run.mergeable) for run in step.after.runs]
    assert grids == [
        (6, 10, 3, False),
        (6, 10, 3, True),
        (3, 5, 3, False),
        (3, 5, 2, True),
        (2, 3, 1, False),
    ]
    # merged 3 x 5 frames do not join the 3 x 5 candidates of the 1x4x4 memory
    assert plan.merge_steps[1].groups[1].num_frames == 2


def test_discard_drops_what_conv_fuses() -> None:
    conv = turn_plan(tiny_config(), (4, 12, 20), (4,), fraction=0.5)
    discard = replace(conv, merge="discard")
    off = replace(conv, merge="off")
    target = 4 * 60
    assert conv.lengths_by_block() == (
        target + 4 * 60 + 4 * 15,
        target + 2 * 60 + 2 * 15 + 2 * 15 + 2 * 6,
        target + 1 * 60 + 3 * 15 + 1 * 15 + 3 * 6,
    )
    assert discard.lengths_by_block() == (
        target + 4 * 60 + 4 * 15,
        target + 2 * 60 + 2 * 15,
        target + 1 * 60 + 1 * 15,
    )
    assert off.lengths_by_block() == (target + 4 * 60 + 4 * 15,) * 3
    assert discard.flops() < conv.flops() < off.flops()


def test_everything_merges_at_fraction_one() -> None:
    plan = turn_plan(tiny_config(), (4, 12, 20), (4,), fraction=1.0)
    assert plan.lengths_by_block()[1:] == (4 * 60 + 4 * 15 + 4 * 6,) * 2
    assert len(plan.merge_steps) == 1  # nothing is left for the second depth
    discard = replace(plan, merge="discard")
    assert discard.lengths_by_block()[1:] == (4 * 60,) * 2


def test_a_merger_decides_the_merged_grid() -> None:
    config = tiny_config(merger=MergerConfig(kernel=(1, 2)))
    plan = turn_plan(config, (2, 12, 20), (), fraction=0.5)
    assert plan.merge_steps[0].after.runs[-1].rows == 6
    assert plan.merge_steps[0].after.runs[-1].columns == 5
    averaging = turn_plan(tiny_config(merger=None), (2, 12, 20), (), fraction=0.5)
    assert averaging.merge_steps[0].after.runs[-1].columns == 5
    assert averaging.merge_steps[0].after.runs[-1].rows == 3


def test_joint_scope_has_no_known_lengths() -> None:
    plan = replace(novel_view_plan(memory=2), scope="joint")
    with pytest.raises(RequestError, match="joint"):
        plan.lengths_by_block()
    assert plan.describe()["merges"] == []
    assert plan.length == novel_view_plan(memory=2).length


def test_describe_is_plain_data() -> None:
    report = novel_view_plan(memory=4).describe()
    assert report["tokens"] == 92_274
    assert report["memory_tokenizers"] == [4, 4, 4, 8]
    # 21 latent frames of 60 x 104, in patches of 4 x 4 or 8 x 8 and padded to whole ones
    assert report["memory_tokens"] == [21 * 15 * 26] * 3 + [21 * 8 * 13]
    assert [(m["block"], m["frames"], m["of"]) for m in report["merges"]] == [
        (10, 56, 105),
        (20, 25, 49),
    ]
    assert report["merges"][0]["tokens_before"] == 92_274
    assert report["merges"][1]["tokens_before"] == report["merges"][0]["tokens_after"]


def test_camera_tracks_follow_the_conditioning_mode() -> None:
    own = turn_plan(tiny_config(), (2, 4, 4), (4, 8))
    target = turn_plan(tiny_config(camera_conditioning="target"), (2, 4, 4), (4, 8))
    none = turn_plan(tiny_config(camera_conditioning="none"), (2, 4, 4), (4, 8))
    assert [segment.camera for segment in own.segments] == [0, 1, 2, 3]
    assert [segment.camera for segment in target.segments] == [0, 0, 0, 0]
    assert [segment.camera for segment in none.segments] == [None] * 4
    without_source = turn_plan(tiny_config(), (2, 4, 4), (4,), source=False)
    assert [(s.role, s.camera) for s in without_source.segments] == [("target", 0), ("memory", 2)]


def test_the_base_model_is_the_plan_with_a_target_alone() -> None:
    plan = turn_plan(WAN_1_3B, (21, 60, 104), (), source=False)
    assert plan.length == 32_760 and plan.merge_steps == ()
    # BASE_MODELS 1.6: 288 TFLOP
    assert round(plan.flops() / 1e12) == 288


def test_memory_tokenizers_by_rank() -> None:
    assert memory_tokenizers(0) == ()
    assert memory_tokenizers(2) == (4, 4)
    assert memory_tokenizers(6) == (4, 4, 4, 8, 8, 8)
    assert memory_tokenizers(3, available=(2, 4)) == (4, 4, 4)
    assert memory_tokenizers(4, mode="uniform") == (2, 2, 2, 2)
    with pytest.raises(RequestError, match=r"\[8\]"):
        memory_tokenizers(4, available=(2, 4))


def test_latent_grid() -> None:
    assert latent_grid(81, (480, 832)) == (21, 60, 104)
    assert latent_grid(17, (96, 160)) == (5, 12, 20)
    assert latent_grid(1, (704, 1280), spatial_stride=16) == (1, 44, 80)
    with pytest.raises(RequestError, match="80 frames"):
        latent_grid(80, (480, 832))
    with pytest.raises(RequestError, match="480x830"):
        latent_grid(81, (480, 830))


def _target(**changes: object) -> Segment:
    return Segment(**{"role": "target", "grid": (2, 4, 4), "camera": 0} | changes)  # type: ignore[arg-type]


def _memory(**changes: object) -> Segment:
    fields = {"role": "memory", "grid": (2, 4, 4), "camera": 1, "tokenizer": 4, "tau": 4}
    return Segment(**fields | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), "no segments"),
        ((_memory(),), "one target"),
        ((_target(), _target()), "one target"),
        ((_memory(), _target()), "one target"),
        ((_target(), _memory(), _memory(role="source", tokenizer=2)), "one target"),
        ((_target(grid=(0, 4, 4)),), "positive"),
        ((_target(camera=None),), "camera"),
        ((_target(grid=(2, 5, 4)),), "even"),
        ((_target(tokenizer=4),), "1x2x2"),
        ((_target(), _memory(tokenizer=6)), "1x6x6"),
    ],
)
def test_rejects_impossible_segments(segments: tuple[Segment, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TokenPlan(segments=segments, shape=tiny_config())


def test_rejects_what_the_shape_cannot_do() -> None:
    with pytest.raises(RequestError, match="camera_conditioning is 'none'"):
        TokenPlan(segments=(_target(),), shape=tiny_config(camera_conditioning="none"))
    with pytest.raises(RequestError, match="has none"):
        turn_plan(tiny_config(tokenizers=()), (2, 4, 4), ())
    with pytest.raises(RequestError, match="merge fraction"):
        turn_plan(tiny_config(), (2, 4, 4), (), fraction=1.5)
    with pytest.raises(RequestError, match="-1"):
        novel_view_plan(memory=-1)
    with pytest.raises(RequestError, match="must lie below 3 blocks"):
        tiny_config(merge_blocks=(3,))


@pytest.mark.parametrize(
    ("depth", "blocks"), [(30, (10, 20)), (10, (3, 6)), (8, (2, 5)), (3, (1, 2)), (2, ())]
)
def test_merging_blocks_are_the_thirds(depth: int, blocks: tuple[int, ...]) -> None:
    assert tiny_config(num_layers=depth).merging_blocks == blocks
    assert tiny_config(num_layers=depth, merge_blocks=(0,)).merging_blocks == (0,)
    assert tiny_config(num_layers=depth, merge_blocks=()).merging_blocks == ()


# memory videos; tokens and PFLOP with uniform and with dynamic tokens, merged, static (METHOD 16)
WINDOWS = [
    (0, 8_190, 0.098, 8_190, 0.098, 0.098, 0.098),
    (1, 16_380, 0.245, 10_374, 0.132, 0.126, 0.105),
    (4, 40_950, 0.982, 15_330, 0.223, 0.180, 0.120),
    (10, 90_090, 3.792, 18_858, 0.299, 0.215, 0.130),
]


@pytest.mark.parametrize("row", WINDOWS, ids=lambda row: f"M={row[0]}")
def test_counts_of_an_editing_window(row: tuple[float, ...]) -> None:
    memory, *expected = int(row[0]), *row[1:]
    uniform = window_plan(memory=memory, tokenizers="uniform", merge="off")
    dynamic = window_plan(memory=memory, merge="off")
    static = window_plan(memory=memory, merge="off", conditioning="static")
    plans = (dynamic, window_plan(memory=memory), static)
    pflop = [round(plan.flops() / 1e15, 3) for plan in plans]
    got = [uniform.length, round(uniform.flops() / 1e15, 3), dynamic.length, *pflop]
    assert got == expected


def test_memory_of_an_editing_window_merges_alone() -> None:
    plan = window_plan(memory=4)
    assert plan.lengths_by_kind == {"target": 8190, "source": 0, "memory": 3 * 2184 + 588}
    # no source among the tokens: at both depths 54 % of the memory frames that are left
    first, second = plan.merge_steps
    assert [(g.num_frames, g.num_merged) for g in first.groups] == [(63, 34), (21, 11)]
    assert [(g.num_frames, g.num_merged) for g in second.groups] == [(29, 15), (10, 5)]
    with pytest.raises(RequestError, match="memory must be a count"):
        window_plan(memory=-1)


def test_editing_plan_orders_time() -> None:
    plan = turn_plan(LUCY_5B, (21, 30, 52), (4, 4, 8))
    assert [segment.tau for segment in plan.segments] == [0, 21, 42, 42]
    assert [segment.reverse for segment in plan.segments] == [False, True, True, True]
    far = turn_plan(LUCY_5B, (21, 30, 52), (4, 4), preceding=False)
    assert [segment.tau for segment in far.segments] == [0, 42, 42]
    assert isinstance(plan.shape, TransformerConfig)
    # 30 x 52 by four and by eight: 8 x 13 and 4 x 7
    assert [s.token_grid for s in plan.segments] == [(15, 26), (8, 13), (8, 13), (4, 7)]


def test_a_plan_without_a_role() -> None:
    plan = turn_plan(tiny_config(), (2, 6, 10), (2, 4), conditioning="static")
    less, places = plan.without("source") or pytest.fail("there is a source")
    assert [segment.role for segment in less.segments] == ["target", "memory", "memory"]
    # of latents [source, memory, memory], and cameras stay those of the videos
    assert places == (1, 2) and less.segments[1:] == plan.segments[2:]
    assert less.conditioning == "static" and less.fraction == plan.fraction
    less, places = plan.without("memory") or pytest.fail("there is memory")
    assert (less.segments, places) == (plan.segments[:2], (0,))
    alone = turn_plan(tiny_config(), (2, 6, 10), ())
    assert alone.without("memory") is None and alone.without("source") is None
