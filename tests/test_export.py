"""Models leave for other runtimes as plain BatchNorm, whether converted or reverted."""

import functools
from collections import Counter

import pytest
import torch
from layers import CLASSES, Silent
from torch import nn
from torch.ao import quantization
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncbn

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


def test_fx_says_what_to_do_with_a_converted_model():
    with pytest.raises(TypeError, match=r"got Proxy; for torch\.fx, syncbn\.revert the model"):
        torch.fx.symbolic_trace(converted().eval())


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
