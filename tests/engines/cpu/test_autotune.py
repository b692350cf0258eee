"""How the cpu engine chooses type and algorithm: timed once, remembered, and forced."""

import json
import logging

import pytest
import torch
from engine_cases import CPU, TYPES, model

from ncsn_fast import EngineUnavailable, Sampler, doctor
from ncsn_fast.engines.cpu import autotune, onednn
from ncsn_fast.engines.cpu.engine import CpuEngine


def engine(of):
    return CpuEngine(of, device=CPU, dtype="fp32", batch_size=2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune.fastest.cache_clear()
    yield tmp_path / "ncsn_fast"
    autotune.fastest.cache_clear()


SPEED = {"fp32 direct": 1.0, "fp32 winograd": 2.0, "bf16 direct": 1.9, "bf16 winograd": 4.0}


def test_the_choice_is_measured_once_and_remembered(cache, monkeypatch):
    choice = autotune.fastest()
    assert list(choice.speed) == [way for way in SPEED if way.split()[0] in TYPES]
    assert all(speed > 0 for speed in choice.speed.values())
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == choice.speed
    monkeypatch.setattr(autotune, "_measure", lambda: pytest.fail("measured again"))
    autotune.fastest.cache_clear()
    assert autotune.fastest() == choice
    assert CpuEngine.default_dtype(CPU) == choice.dtype


@pytest.mark.parametrize("damage", ["{", "[]", '{"fp32 direct": 1}'])
def test_a_damaged_memory_is_measured_anew(cache, monkeypatch, damage):
    autotune.fastest()
    (file,) = cache.iterdir()
    file.write_text(damage)
    monkeypatch.setattr(autotune, "_measure", lambda: SPEED)
    autotune.fastest.cache_clear()
    assert autotune.fastest() == autotune.Choice(SPEED)
    assert json.loads(file.read_text()) == SPEED


@pytest.mark.parametrize(
    ("changes", "dtype", "algorithms"),
    [
        ({}, "bf16", ("winograd", "winograd")),
        ({"bf16 direct": 4.0}, "bf16", ("winograd", "direct")),
        ({"bf16 direct": 0.1, "bf16 winograd": 0.2}, "fp32", ("winograd", "winograd")),
        (
            {"fp32 winograd": 1.05, "bf16 winograd": 1.05, "bf16 direct": 1.0},
            "fp32",
            ("direct",) * 2,
        ),
    ],
)
def test_the_fastest_way_is_chosen(changes, dtype, algorithms):
    choice = autotune.Choice({**SPEED, **changes})
    assert choice.dtype == dtype
    assert (choice.algorithm("fp32"), choice.algorithm("bf16")) == algorithms
    assert str(choice).startswith(f"{dtype}, 3x3 convolutions ")


def test_convolutions_can_be_forced(monkeypatch):
    of = model(ngf=32)
    kinds = {}
    for name in ("direct", "winograd"):
        built = CpuEngine(of, device=CPU, dtype="fp32", batch_size=1, convolutions=name)
        monkeypatch.setenv("NCSN_FAST_CONVOLUTIONS", name)
        assert engine(of).convolutions == built.convolutions == name
        kinds[name] = {cost.kind for cost in built._plan((16, 16)).costs}
    assert "winograd" in kinds["winograd"]
    assert "winograd" not in kinds["direct"]
    monkeypatch.setenv("NCSN_FAST_CONVOLUTIONS", "fft")
    with pytest.raises(ValueError, match="must be 'direct' or 'winograd'; got 'fft'"):
        engine(of)


def test_a_cache_that_cannot_be_written_costs_nothing(cache, caplog):
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        assert autotune.fastest().speed["fp32 direct"] == 1
    assert "timed anew next time" in caplog.text


def test_types_that_the_processor_lacks_are_never_tried(cache, monkeypatch):
    """As on x86-64 without AVX-512, where packing a bfloat16 weight raises."""
    pack = onednn.pack

    def without_bfloat16(of, shape, dtype):
        if dtype is torch.bfloat16:
            raise RuntimeError("bf16 path needs avx512bw\nand a backtrace")
        return pack(of, shape, dtype)

    monkeypatch.setattr(onednn, "pack", without_bfloat16)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    onednn.lacks.cache_clear()
    try:
        assert list(autotune.fastest().speed) == ["fp32 direct", "fp32 winograd"]
        sampler = Sampler(model(), device="cpu")
        assert sampler.dtype == "fp32"
        assert doctor.main([]) == 0
        words = (
            r"'cpu' cannot compute in bf16 here: oneDNN has no bf16 convolutions for this "
            r"processor \(bf16 path needs avx512bw; the environment sets ONEDNN_MAX_CPU_ISA=AVX2\)"
            r"; leave dtype out, or use dtype='fp32'"
        )
        for name in ("cpu", "auto"):
            with pytest.raises(EngineUnavailable, match=words):
                Sampler(model(), engine=name, device="cpu", dtype="bf16")
        with pytest.raises(EngineUnavailable, match=words):
            CpuEngine(model(), device=CPU, dtype="bf16", batch_size=1)
    finally:
        onednn.lacks.cache_clear()
