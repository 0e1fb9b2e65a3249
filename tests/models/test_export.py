"""Models leave for other runtimes as plain BatchNorm, whether converted or reverted."""

import functools
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import fuse_fx, prepare_fx, prepare_qat_fx
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncbn
from support.layers import CLASSES, Silent

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit and torch.ao
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network():
    """A BatchNorm that nothing can absorb, one after a convolution, one after a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.BatchNorm1d(5)),
    )
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor, 1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def converted():
    return syncbn.convert(network(), Silent())


def direct():
    """Built with this library's layers."""
    model = network()
    for index, layer in enumerate(model):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            model[index] = CLASSES[type(layer)](layer.num_features, process_group=Silent())
            model[index].load_state_dict(layer.state_dict())
    return model


def reverted():
    return syncbn.revert(converted())


builders = pytest.mark.parametrize("build", [converted, direct, reverted])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@builders
def test_torch_export_gives_the_plain_models_program(build, training, strict):
    """In training mode too: the group is not asked, and the program moves its own buffers."""
    model, plain = build().train(training), network().train(training)
    program, theirs = (torch.export.export(m, (X,), strict=strict) for m in (model, plain))
    operators = [
        Counter(node.target for node in p.graph.nodes if node.op == "call_function")
        for p in (program, theirs)
    ]
    assert operators[0] == operators[1]
    assert operators[0][torch.ops.aten.batch_norm.default] == 3
    exported = program.module()
    for x in (X, X + 1):
        close(exported(x), plain(x))
    expected = plain.state_dict()
    close({name: expected[name] for name in exported.state_dict()}, dict(exported.state_dict()))


# --- ONNX ------------------------------------------------------------------------------------


def to_onnx(model, optimize=True):
    pytest.importorskip("onnxscript", reason="needs the extra [export-test]")
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        return torch.onnx.export(
            *(model.eval(), (X,)),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            optimize=optimize,
            verbose=False,
        )


def operators_of(program):
    return [node.op_type for node in program.model.graph]


@functools.cache
def plain_operators():
    return operators_of(to_onnx(network()))


@builders
def test_onnx_has_plain_batch_normalization(build):
    """One after a convolution is folded into it, as the exporter does with torch's layers."""
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra [export-test]")
    model = build()
    program = to_onnx(model)
    operators = operators_of(program)
    assert operators == plain_operators()
    assert operators.count("BatchNormalization") == 2
    assert operators[operators.index("Conv") + 1] == "Relu"
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (name,) = (value.name for value in session.get_inputs())
    for x in (X, torch.randn(7, 3, 6, 6)):
        (y,) = session.run(None, {name: x.numpy()})
        close(torch.from_numpy(y), network().eval()(x))


def test_onnx_keeps_every_batch_normalization_where_it_does_not_optimise():
    operators = operators_of(to_onnx(converted(), optimize=False))
    assert operators.count("BatchNormalization") == 3
    assert operators[operators.index("Conv") + 1] == "BatchNormalization"


# --- torch.jit, torch.fx ---------------------------------------------------------------------


def test_traces_among_ranks_record_plain_batch_norm(ranks):
    """With the default group and no message: rank 1 need not even trace."""

    def run(rank):
        if rank:
            return None
        model = syncbn.convert(network()).eval()
        traced, plain = (torch.jit.trace(m, X) for m in (model, network().eval()))
        exported = torch.export.export(syncbn.convert(network()), (X,))
        nodes = [[node.kind() for node in t.inlined_graph.nodes()] for t in (traced, plain)]
        return traced(X + 1), exported.module()(X), nodes

    traced, exported, nodes = ranks(2, run)[0]
    assert nodes[0] == nodes[1]
    assert nodes[0].count("aten::batch_norm") == 3
    close(traced, network().eval()(X + 1))
    close(exported, network()(X))


def test_masks_are_exported_in_eval_mode():
    mask = torch.ones(4, 6, 6, dtype=torch.bool)
    mask[:, :, 4:] = False
    x = torch.randn(4, 3, 6, 6)
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(3)))
    with syncbn.masking(model, mask):
        with pytest.raises(Exception, match="data-dependent"):
            torch.export.export(model, (x,))
        program = torch.export.export(model.eval(), (x,)).module()
        expected = model(x + 1)
    close(program(x + 1), expected)
    assert not expected[..., 4:].any()


def test_a_program_that_trains_skips_no_batch():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(3)), skip_nonfinite=True)
    program = torch.export.export(model, (torch.randn(4, 3, 2, 2),)).module()
    program(torch.full((4, 3, 2, 2), torch.inf))
    assert dict(program.named_buffers())["0.running_mean"].isinf().all()


@pytest.mark.parametrize("training", [True, False])
def test_a_reverted_model_scripts(training):
    scripted, plain = torch.jit.script(reverted()).train(training), network().train(training)
    close(scripted(X), plain(X))
    close(dict(scripted.state_dict()), dict(plain.state_dict()))


@builders
def test_fuse_conv_bn_eval_takes_every_layer(build):
    model = build().eval()
    fused = fuse_conv_bn_eval(model[2], model[3])
    close(fused(X), model[3](model[2](X)))
    assert type(fused) is nn.Conv2d


def test_fx_fuses_a_reverted_model():
    fused = fuse(reverted().eval())
    assert [type(layer) for layer in fused.children()].count(nn.BatchNorm2d) == 1
    close(fused(X), network().eval()(X))


QCONFIGS = quantization.get_default_qat_qconfig_mapping("x86")


class OwnProxy(torch.fx.Tracer):
    """As those of transformers and others have theirs."""

    def proxy(self, node):
        return type("OwnProxy", (torch.fx.Proxy,), {})(node, self)


def masked(model):
    with syncbn.masking(model, torch.ones(4, 6, 6, dtype=torch.bool)):
        torch.fx.symbolic_trace(model)


FX = {
    "symbolic_trace": torch.fx.symbolic_trace,
    "another tracer": lambda model: OwnProxy().trace(model),
    "masking": masked,
    "prepare_fx": lambda model: prepare_fx(model.eval(), QCONFIGS, (X,)),
    "prepare_qat_fx": lambda model: prepare_qat_fx(model.train(), QCONFIGS, (X,)),
    "fuse_fx": lambda model: fuse_fx(model.eval()),
    "lazy": lambda model: torch.fx.symbolic_trace(syncbn.LazySyncBatchNorm2d()),
    "function": lambda model: torch.fx.symbolic_trace(
        lambda x: syncbn.sync_batch_norm(x, None, None, training=model.training)
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tool", FX)
@pytest.mark.parametrize("build", [converted, direct])
def test_fx_says_what_to_do_with_a_converted_model(build, tool, training):
    model = build().train(training)
    with pytest.raises(TypeError, match=r"got \w*Proxy; for torch\.fx, syncbn\.revert the model"):
        FX[tool](model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [converted, direct, lambda: syncbn.LazySyncBatchNorm2d()])
def test_script_says_what_to_do_with_a_converted_model(build, training):
    model = build().train(training)
    before = list(model.modules())
    words = r"torch\.jit\.script: expected .* got \w*SyncBatchNorm2d; syncbn\.revert the model"
    with pytest.raises(TypeError, match=words):
        torch.jit.script(model)
    assert all(one is other for one, other in zip(before, model.modules(), strict=True))


# --- quantisation ----------------------------------------------------------------------------


def with_qconfig(model):
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    model[3].qconfig = quantization.get_default_qat_qconfig("x86")
    return model


def quantisation_aware(model):
    """The layers from the first convolution to its ReLU fused into one, ready to train."""
    fused = quantization.fuse_modules_qat(model.train(), [["2", "3", "4"]])
    return quantization.prepare_qat(fused)


def running_statistics(model):
    return {name: b for name, b in model.named_buffers() if "running_" in name}


def test_convert_and_revert_keep_the_qconfig():
    model = with_qconfig(network())
    configs = [model.qconfig, model[3].qconfig]
    for change in (syncbn.convert, syncbn.revert):
        change(model)
        assert model.qconfig is configs[0]
        assert model[3].qconfig is configs[1]
        assert "qconfig" not in vars(model[0])


@pytest.mark.parametrize("build", [converted, direct])
def test_reverted_models_prepare_for_quantisation_as_plain_ones(build):
    ours, plain = with_qconfig(build()), with_qconfig(network())
    prepared = [quantisation_aware(model) for model in (syncbn.revert(ours), plain)]
    assert prepared[0][2].qconfig is not None
    names = [[type(layer) for layer in model.modules()] for model in prepared]
    assert names[0] == names[1]
    close(prepared[0](X), prepared[1](X))
    with pytest.raises(AssertionError, match="fuser method"):
        quantisation_aware(with_qconfig(build()))


@pytest.mark.parametrize("aware", [True, False])
def test_revert_names_what_was_converted_before_it_was_prepared(aware):
    """Only BatchNorm2d and 3d have a quantised form."""
    prepare = quantization.prepare_qat if aware else quantization.prepare
    model = prepare(with_qconfig(syncbn.convert(network())).train(aware))
    model(X)
    words = r"revert: cannot be quantised: 0, 3, to which .* Prepare the plain model"
    with pytest.warns(UserWarning, match=words):
        syncbn.revert(model)
    with pytest.raises(AttributeError, match="activation_post_process"):
        quantization.convert(model.eval())


@pytest.mark.parametrize("aware", [True, False])
def test_a_model_prepared_and_then_converted_quantises_as_a_plain_one(aware):
    prepare = quantization.prepare_qat if aware else quantization.prepare
    if aware:
        prepare = quantisation_aware
    model, plain = (prepare(with_qconfig(network()).train(aware)) for _ in range(2))
    syncbn.convert(model)
    for prepared in (model, plain):
        prepared(X)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="revert")
        syncbn.revert(model)
    quantised = [quantization.convert(m.eval()) for m in (model, plain)]
    assert [type(m) for m in quantised[0].modules()] == [type(m) for m in quantised[1].modules()]


def test_quantisation_aware_training_over_ranks(ranks):
    """Prepared, then converted: the BatchNorm inside the fused layer counts all ranks' images."""

    def run(rank):
        model = syncbn.convert(quantisation_aware(with_qconfig(network())))
        assert isinstance(model[2].bn, syncbn.SyncBatchNorm)
        model.apply(quantization.disable_fake_quant)  # whose ranges would be each rank's own
        y = model(X[2 * rank : 2 * rank + 2])
        quantized = quantization.convert(syncbn.revert(model).eval())
        return y.detach(), running_statistics(model), [type(m) for m in quantized]

    plain = quantisation_aware(with_qconfig(network()))
    plain.apply(quantization.disable_fake_quant)
    y = plain(X)
    kinds = [type(m) for m in quantization.convert(plain.eval())]
    results = ranks(2, run)
    close(torch.cat([result[0] for result in results]), y.detach())
    for _, running, kinds_ in results:
        close(running, running_statistics(plain))
        assert kinds_ == kinds
