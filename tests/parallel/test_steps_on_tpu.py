"""Whole engine steps compiled for TPUs: they fit, move nothing that could stay, and read what they must."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest

from tests.parallel.compile_step import CompiledStep, Setting, compile_step
from tests.parallel.hlo import collectives, copies_of, parse
from tests.parallel.hlo_traffic import Traffic

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler (pip install 'jaxllm[compilers]')",
)

STEPS = {
    # Three rows of keys and values to a token, which a TPU stores as four.
    "llama-135m on one v5e, decode": (Setting("llama-135m", "v5e:2x4", 1, 16e9, page_size=16), "decode"),
    "llama-3.1-8b on one v6e, mixed": (Setting("llama-3.1-8b", "v6e:2x4", 1, 32e9), "mixed"),
    "llama-3.1-70b on eight v6e, decode": (Setting("llama-3.1-70b", "v6e:2x4", 8, 32e9), "decode"),
    # A chip has 192 columns of each expert, of which a TPU left to itself makes rows.
    "qwen3-30b-a3b on four v6e, decode": (Setting("qwen3-30b-a3b", "v6e:2x4", 4, 32e9), "decode"),
    # Four replicas of two chips, with sixteen of the experts whole on each.
    "qwen3-30b-a3b on four times two v6e, decode": (
        Setting("qwen3-30b-a3b", "v6e:2x4", 2, 32e9, data=4),
        "decode",
    ),
}


@needs_libtpu
@pytest.mark.parametrize("name", STEPS)
def test_a_step_fits_moves_nothing_and_reads_what_it_must(name: str) -> None:
    setting, kind = STEPS[name]
    compiled = compile_step(setting, kind)
    check_memory(setting, compiled)
    check_nothing_moves(setting, compiled)
    check_traffic(setting, kind, compiled.traffic)


def check_memory(setting: Setting, compiled: CompiledStep) -> None:
    memory = compiled.executable.memory_analysis()
    # Nearly all of the memory is taken: a step that fits here fits where there is less to hold.
    assert setting.cache_bytes + setting.layout.device_bytes >= 0.75 * setting.memory
    assert memory.argument_size_in_bytes >= setting.cache_bytes + setting.layout.device_bytes
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes <= setting.memory
    # Cache and state are updated in place.
    assert memory.alias_size_in_bytes >= setting.cache_bytes


def check_nothing_moves(setting: Setting, compiled: CompiledStep) -> None:
    module = parse(compiled.text)
    [layer] = module.loops_over(compiled.cache_shape)
    expected = Counter({"all-reduce": 2} if setting.tensor > 1 else {})
    if setting.data > 1:
        # Rows and the numbers of their experts there, results back; and how many rounds of that all make.
        expected += Counter({"all-to-all": 3, "all-reduce": 1})
    assert collectives(layer) == expected
    shapes = {compiled.cache_shape}
    for array in setting.layout.arrays:
        if array.name.startswith("layers.") and len(array.shape) > 2:
            layers, *rest = (str(size) for size in array.device_shape)
            shapes |= {f"bf16[{','.join(part)}]" for part in (rest, ["1", *rest], [layers, *rest])}
    # Within a fusion a slice is a part of what it computes.
    fused = {name for one in module.instructions if one.opcode == "fusion" for name in one.called}
    alone = [one for name, found in module.computations.items() if name not in fused for one in found]
    assert copies_of(alone, shapes) == []


def check_traffic(setting: Setting, kind: str, traffic: Traffic) -> None:
    least = setting.weight_bytes + setting.kv_bytes
    # The cost estimate of the kernel, too, is of sequences as long as they may be.
    assert traffic.bytes >= 0.98 * least
    assert traffic.bytes <= 1.15 * (least + setting.activation_bytes(kind)), traffic.largest()


LOOP = """HloModule m

%slice_of_one (p: bf16[4,8,16], i: s32[]) -> bf16[8,16] {
  %p = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %z = s32[]{:T(128)} constant(0)
  %s = bf16[1,8,16]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,8,16}
  ROOT %b = bf16[8,16]{1,0:T(8,128)(2,1)} bitcast(%s)
}

%body (c: (s32[], bf16[4,8,16], bf16[8,16])) -> (s32[], bf16[4,8,16], bf16[8,16]) {
  %c = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%c), index=0
  %w = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%c), index=1
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %n), kind=kLoop, calls=%slice_of_one
  %k = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1","bytes_accessed":"1000"}}}
  ROOT %t = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) tuple(%n, %w, %k)
}

%condition (c.1: (s32[], bf16[4,8,16], bf16[8,16])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  %four = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[]{:T(512)} compare(%n.1, %four), direction=LT
}

ENTRY %main (w: bf16[4,8,16], x: bf16[8,16]) -> bf16[8,16] {
  %w.1 = bf16[4,8,16]{2,1,0} parameter(0)
  %x.1 = bf16[8,16]{1,0} parameter(1)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %start = (bf16[8,16]{1,0:S(1)}, bf16[8,16]{1,0}, u32[]{:S(2)}) copy-start(%x.1)
  %done = bf16[8,16]{1,0:S(1)} copy-done(%start)
  %t.1 = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, bf16[8,16]{1,0:S(1)}) tuple(%zero, %w.1, %done)
  %loop = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0}, bf16[8,16]{1,0:S(1)}) while(%t.1), condition=%condition, body=%body
  %y = bf16[8,16]{1,0:S(1)} get-tuple-element(%loop), index=2
  ROOT %out = bf16[8,16]{1,0} negate(%y)
}
"""  # noqa: E501


def test_traffic_counts_slices_kernels_and_turns_of_loops() -> None:
    matrix = 8 * 16 * 2
    # In: x. Four turns: the layer's slice, read into fast memory, and the kernel's estimate. Out: the result.
    assert Traffic(LOOP).bytes == matrix + 4 * (matrix + 1000) + matrix
    # A copy of all layers in the loop reads and writes them in each turn.
    copied = LOOP.replace("%x = bf16[8,16]", "%all = bf16[4,8,16]{2,1,0} copy(%w)\n  %x = bf16[8,16]")
    assert Traffic(copied).bytes == Traffic(LOOP).bytes + 4 * 2 * 4 * matrix
