"""The double of TensorRT builds and refuses as TensorRT does; TensorRT-RTX, if there, agrees."""

import re

import pytest
import tensorrt_double as double
from tensorrt_double.script import RANGE, Build, logger, monitor, small


@pytest.fixture(params=double.VERSIONS)
def trt(request):
    return double.make(request.param)


def test_loggers(trt, capsys):
    class Forgetful(trt.ILogger):
        def __init__(self):
            pass

    class Mute(trt.ILogger):
        pass

    class Raising(trt.ILogger):
        def log(self, severity, msg):
            raise KeyboardInterrupt(msg)

    with pytest.raises(TypeError, match=r"ILogger.__init__\(\) must be called when overriding"):
        Forgetful()
    for kind, words in ((Mute, 'pure virtual function "ILogger::log"'), (Raising, "empty memory")):
        assert trt.Runtime(kind()).deserialize_cuda_engine(b"") is None
        assert words in capsys.readouterr().err
    quiet = trt.Logger(min_severity=trt.Logger.ERROR)
    quiet.log(trt.Logger.WARNING, "unseen")
    quiet.log(trt.Logger.ERROR, "seen")
    quiet.log(trt.Logger.INTERNAL_ERROR, "fatal")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("[TRT] ")[2] for line in lines] == ["[E] seen", "[F] fatal"]
    quiet.min_severity = trt.Logger.VERBOSE
    assert quiet.min_severity == trt.ILogger.VERBOSE


def test_without_a_driver():
    for version in double.VERSIONS:
        trt = double.make(version, driver=False)
        for kind in (trt.Builder, trt.Runtime):
            log, messages = logger(trt)
            with pytest.raises(TypeError, match=r"^pybind11::init\(\): factory function returned"):
                kind(log)
            assert "CUDA initialization failure with error: 35" in messages.errors()


def test_networks_have_the_graphs_inputs_and_outputs(trt):
    build = Build(trt, small())
    network = build.network
    assert (build.parsed, build.parser.num_errors, build.profiles) == (True, 0, [0])
    x, level = (network.get_input(i) for i in range(network.num_inputs))
    f = network.get_output(network.num_outputs - 1)
    assert [(one.name, tuple(one.shape)) for one in (x, level, f)] == [
        ("x", (-1, 2, -1, -1)), ("level", (-1,)), ("f", (-1, 2, -1, -1)),
    ]  # fmt: skip
    assert (x.dtype, level.dtype) == (trt.float32, trt.int64)
    assert network.get_input(2) is None
    assert "getInput" in build.messages.errors()
    assert build.messages[0] == ("WARNING", "ModelImporter.cpp:1071: Make sure input level has "
                                            "Int64 binding.")  # fmt: skip


def test_parse_errors(trt):
    damaged = Build(trt, small()[:-100], ranges=None)
    assert (damaged.parsed, damaged.parser.num_errors) == (False, 1)
    error = damaged.parser.get_error(0)
    assert error.code() == trt.ErrorCode.MODEL_DESERIALIZE_FAILED
    assert error.desc().endswith("Failed to parse the ONNX model.")
    assert error.desc() in damaged.messages.errors()
    assert str(error).startswith("(deserializeOnnxModel): MODEL_DESERIALIZE_FAILED: ")
    assert damaged.parser.get_error(1) is None
    damaged.parser.clear_errors()
    assert damaged.parser.num_errors == 0

    unknown = Build(trt, small(operator="Convolve"), ranges=None)
    error = unknown.parser.get_error(0)
    assert (error.node(), error.node_name(), error.node_operator()) == (1, "first/Conv", "Convolve")
    assert error.code() == trt.ErrorCode.UNSUPPORTED_NODE
    assert unknown.plan() is None

    empty = Build(trt, b"", ranges=None)  # TensorRT's parser takes an empty message, too
    assert (empty.parsed, empty.network.num_layers) == (True, 0)
    assert empty.plan() is None
    assert "at least one output" in empty.messages.errors()
    twice = Build(trt, small())
    assert twice.parser.parse(small()) is False


def test_configuration(trt):
    build = Build(trt, small())
    settings, flags = build.config, trt.BuilderFlag
    assert settings.get_flag(flags.TF32)
    assert not settings.get_flag(flags.REFIT)
    settings.clear_flag(flags.TF32)
    settings.set_flag(flags.REFIT)
    assert settings.flags == 1 << int(flags.REFIT)
    assert (settings.builder_optimization_level, settings.max_aux_streams) == (3, -1)
    settings.builder_optimization_level = 9
    assert settings.builder_optimization_level == 5
    settings.builder_optimization_level = -1
    assert settings.builder_optimization_level == 5
    assert "level >= 0" in build.messages.errors()
    assert settings.profiling_verbosity == trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    assert settings.hardware_compatibility_level == trt.HardwareCompatibilityLevel.NONE
    settings.set_flag(flags.STRIP_PLAN)
    with pytest.raises(NotImplementedError, match="STRIP_PLAN"):
        build.plan()


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        (None, "Network has dynamic or shape inputs, but no optimization profile"),
        ({"x": RANGE["x"]}, "Dynamic input tensor level is missing dimensions in profile 0"),
        ({**RANGE, "x": ((1, 2, 4),) * 3}, "x has 4 dimensions but profile 0 has 3 dimensions"),
        ({**RANGE, "x": ((2, 3, 4, 4),) * 3}, "axis 1, profile has min=3, opt=3, max=3 but tensor"),
        ({**RANGE, "level": ((1,), (3,), (4,))}, "kOPT values are not self-consistent.*name batch"),
    ],
)
def test_profiles_that_contradict_the_network(trt, ranges, words):
    build = Build(trt, small(), ranges=ranges)
    assert build.plan() is None
    assert re.search(words, build.messages.errors())
    assert double.behaviour_of(trt).n_builds == 0


def test_profiles_that_are_out_of_order(trt):
    build = Build(trt, small(), ranges={**RANGE, "level": ((2,), (1,), (4,))})
    assert build.profiles == [-1]
    assert build.config.num_optimization_profiles == 0
    assert "MIN<=OPT<=MAX" in build.messages.errors()
    assert build.add(RANGE) == 0
    assert build.add(RANGE) == 1
    assert build.builder.create_optimization_profile().get_shape("x") == []


def test_failed_builds(trt):
    behaviour = double.behaviour_of(trt)
    build = Build(trt, small())
    behaviour.needs_workspace = 1 << 20
    build.config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1000)
    assert build.plan() is None
    assert "no tactics to implement the operation within workspace" in build.messages.errors()
    build.config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 20)
    assert build.plan() is not None
    behaviour.fail_build = True
    assert build.plan() is None
    assert "Could not find any implementation" in build.messages.errors()
    assert behaviour.n_builds == 1


def test_precision_flags_are_refused_in_strongly_typed_networks():
    trt = double.make("10.16")
    for typed in (True, False):
        build = Build(trt, small(), typed=typed)
        build.config.set_flag(trt.BuilderFlag.FP16)
        assert (build.plan() is None) == typed


@pytest.mark.parametrize("steps", [1000, 3, 0])
def test_progress(trt, steps):
    build = Build(trt, small())
    build.config.progress_monitor, told = monitor(trt, steps)
    made = build.plan()
    assert (made is None) == (steps < 1000)
    assert ("BuildCanceled" in build.messages.errors()) == (steps < 1000)
    open_phases, counted = [], {}
    for kind, name, *rest in told:
        if kind == "start":
            assert rest[0] == (open_phases[-1] if open_phases else None)
            open_phases.append(name)
            counted[name] = [0, rest[1]]
        elif kind == "step":
            assert name == open_phases[-1]
            assert rest == [counted[name][0]]
            counted[name][0] += 1
        else:
            assert open_phases.pop() == name
    assert not open_phases
    assert len(counted) >= 2 if steps else len(counted) >= 1
    if made is not None:
        assert all(done == expected for done, expected in counted.values())
        assert counted["Timing tactics"][1] == build.network.num_layers


def test_interrupts_in_a_monitor_cancel_the_build(trt, capsys):
    class Interrupted(trt.IProgressMonitor):
        def phase_start(self, *arguments):
            pass

        phase_finish = phase_start

        def step_complete(self, phase_name, step):
            raise KeyboardInterrupt

    build = Build(trt, small())
    build.config.progress_monitor = Interrupted()
    assert build.plan() is None
    assert "Exception caught in step_complete(): KeyboardInterrupt" in capsys.readouterr().err


def test_timing_caches(trt):
    behaviour = double.behaviour_of(trt)

    def build(content=b"", level=3):
        one = Build(trt, small())
        one.config.builder_optimization_level = level
        assert one.config.get_timing_cache() is None
        cache = one.config.create_timing_cache(content)
        assert one.config.set_timing_cache(cache, False)
        before = bytes(cache.serialize())
        assert one.plan() is not None
        return before, bytes(one.config.get_timing_cache().serialize()), one.messages

    empty, full, _ = build()
    assert len(full) > len(empty)
    assert build(level=0)[1] == empty
    kept, again, messages = build(full)
    assert full == kept == again
    assert "WARNING" not in {severity for severity, text in messages if "cache" in text}
    refused, _, messages = build(full[:-3])
    assert refused == empty
    assert ("WARNING", "The timing cache will not be used!") in messages
    other = double.make(next(v for v in double.VERSIONS if not trt.__version__.startswith(v)))
    foreign = Build(other, small()).config
    assert bytes(foreign.create_timing_cache(full).serialize()) != full

    behaviour.gpu = "NVIDIA A100-SXM4-80GB"
    one = Build(trt, small())
    cache = one.config.create_timing_cache(full)
    assert one.config.set_timing_cache(cache, False) is False
    assert one.config.get_timing_cache() is None
    assert one.config.set_timing_cache(cache, True) is True


def test_tensorrt_rtx_answers_alike():
    """Its builder needs no GPU; its interface is that of TensorRT 11."""
    rtx = pytest.importorskip("tensorrt_rtx")
    content = small("bf16")

    def outcome(trt, content, ranges, change=None):
        build = Build(trt, content, ranges=ranges)
        if trt is rtx:
            build.config.num_compute_capabilities = 1
            build.config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        if change is not None:
            change(trt, build)
        network = build.network
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        made = build.plan()
        reasons = [text.split(" In ")[0] for severity, text in build.messages
                   if severity == "ERROR" and "buildSerializedNetwork" in text]  # fmt: skip
        return (
            build.parsed, build.parser.num_errors, build.profiles,
            [(t.name, tuple(t.shape), t.dtype.name) for t in tensors],
            build.config.get_flag(trt.BuilderFlag.TF32), build.config.builder_optimization_level,
            made is None or made.dtype.name, [text.removesuffix(")") for text in reasons],
        )  # fmt: skip

    def cancel(trt, build):
        build.config.progress_monitor, _ = monitor(trt, 5)

    def level(trt, build):
        build.config.builder_optimization_level = 9

    ours = double.make("11.4")
    fixed = small(dims=(2, 8, 8))
    for case in (
        (content, RANGE), (content, RANGE, level), (fixed, None), (content, RANGE, cancel),
        (content, None), (content, {"x": RANGE["x"]}), (content[:-100], None), (b"", None),
        (content, {**RANGE, "x": ((1, 3, 8, 8),) * 3}), (fixed, RANGE),
        (content, {**RANGE, "x": ((2, 2, 8, 8), (1, 2, 8, 8), (3, 2, 8, 8))}),
        (content, {**RANGE, "level": ((1,), (3,), (4,))}),
    ):  # fmt: skip
        assert outcome(ours, *case) == outcome(rtx, *case)
