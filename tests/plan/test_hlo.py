"""Reading a compiled program's text."""

import pytest

from m3ae_jax.plan.hlo import Program, replica_groups

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%take (stack: bf16[12,4,64], i: s32[]) -> bf16[1,4,64] {
  %stack = bf16[12,4,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,4,64]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,4,64}
}

%started (w: bf16[4,64]) -> bf16[16,64] {
  %w = bf16[4,64]{1,0} parameter(0)
  ROOT %gather = bf16[16,64]{1,0} all-gather(%w), channel_id=7, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

%ended (w: bf16[4,64]) -> bf16[16,64] {
  %w = bf16[4,64]{1,0} parameter(0)
  ROOT %gather.1 = bf16[16,64]{1,0} all-gather(%w), channel_id=7, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}

%all-reduce-scatter.1 (g: f32[16,64]) -> f32[4,64] {
  %g = f32[16,64]{1,0} parameter(0)
  %whole = f32[16,64]{1,0} all-reduce(%g), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  %mine = s32[] constant(4)
  ROOT %part = f32[4,64]{1,0} dynamic-slice(%whole, %mine, %mine), dynamic_slice_sizes={4,64}
}

%body (state: (s32[], bf16[12,4,64])) -> (s32[], bf16[12,4,64]) {
  %state = (s32[], bf16[12,4,64]) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %layers = bf16[12,4,64]{2,1,0} get-tuple-element(%state), index=1
  %layer = bf16[1,4,64]{2,1,0} fusion(%layers, %n), kind=kLoop, calls=%take
  %weight = bf16[4,64]{1,0} bitcast(%layer)
  %begin = bf16[16,64]{1,0} fusion(%weight), kind=kCustom, calls=%started
  %end = bf16[16,64]{1,0} fusion(%weight), kind=kCustom, calls=%ended
  ROOT %next = (s32[], bf16[12,4,64]) tuple(%n, %layers)
}

%condition (state.1: (s32[], bf16[12,4,64])) -> pred[] {
  %state.1 = (s32[], bf16[12,4,64]) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%n.1, %limit), direction=LT
}

ENTRY %main (p: (s32[], bf16[12,4,64]), g: f32[16,64]) -> f32[4,64] {
  %p = (s32[], bf16[12,4,64]) parameter(0)
  %loop = (s32[], bf16[12,4,64]) while(%p), condition=%condition, body=%body
  %grad = f32[16,64]{1,0} parameter(1)
  %chip = f32[1000,1000]{1,0:T(8,128)S(1)} copy(%grad)
  ROOT %out = f32[4,64]{1,0} fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_count_as_often_as_their_loop_runs_and_once_a_channel():
    collectives = {c.kind: c for c in Program(TEXT).collectives()}
    assert set(collectives) == {"all-gather", "reduce-scatter"}
    assert collectives["all-gather"].count == 12
    assert collectives["all-gather"].bytes == 12 * 16 * 64 * 2 * 3 / 4
    assert collectives["reduce-scatter"].count == 1
    assert collectives["reduce-scatter"].bytes == 16 * 64 * 4 * 3 / 4


def test_collectives_across_slices_are_distinguished():
    assert not any(c.crosses_slices for c in Program(TEXT, slice_size=4).collectives())
    assert all(c.crosses_slices for c in Program(TEXT, slice_size=2).collectives())


def test_traffic_counts_slices_of_a_stack_and_nothing_on_the_chip():
    layer, gathered = 4 * 64 * 2, 16 * 64 * 2
    index = 4
    loop = 12 * (layer + index + layer + 2 * (layer + gathered) + 1) + 12 * 2 * index
    out = 16 * 64 * 4 + 4 * 64 * 4
    copy = 16 * 64 * 4
    assert abs(Program(TEXT).memory_traffic() - (loop + out + copy)) <= 12 * 16


def test_a_slice_within_a_fusion_within_a_fusion_is_a_slice():
    nested = """%inner (stack: bf16[12,64], i: s32[]) -> bf16[1,64] {
  %stack = bf16[12,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,64]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,64}
}

%outer (i.1: s32[], stack.1: bf16[12,64]) -> bf16[1,64] {
  %i.1 = s32[] parameter(0)
  %stack.1 = bf16[12,64]{1,0} parameter(1)
  ROOT %layer = bf16[1,64]{1,0} fusion(%stack.1, %i.1), kind=kLoop, calls=%inner
}

ENTRY %main (p: bf16[12,64], n: s32[]) -> bf16[1,64] {
  %p = bf16[12,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %out = bf16[1,64]{1,0} fusion(%n, %p), kind=kLoop, calls=%outer
}
"""
    assert Program(nested).memory_traffic() == 4 + 2 * 64 * 2


def test_cycles_of_the_compilers_cost_model_count_as_often_as_loops_run():
    costed = TEXT.replace("calls=%take", 'calls=%take, backend_config={"estimated_cycles":"100","x":[]}')
    assert Program(costed).cycles() == 12 * 100
    assert Program(TEXT).cycles() == 0


def test_largest_arrays():
    (first, *_) = Program(TEXT).largest_arrays()
    assert (first.shape, first.bytes) == ("bf16[16,64]", 16 * 64 * 2)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("dimensions={0}", []),
    ],
)
def test_groups_in_every_notation(text, groups):
    assert replica_groups(text) == groups
