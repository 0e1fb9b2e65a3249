"""SyncBN, the plugin for Lightning: two ranks equal one process with the whole batch."""

from __future__ import annotations

import doctest
import importlib
import os
import pickle
import sys
from unittest import mock

import pytest
import torch
from torch import nn

import syncbn
from support.scripts import execute
from support.training import assert_same_state, batches, network, train

pytest.importorskip("lightning", reason="needs the extra [frameworks]")

CLASSES = [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]
SETTINGS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


def modules(package: str):
    """Lightning's module, and the plugin."""
    return importlib.import_module(package), importlib.import_module(
        "syncbn.integrations.lightning"
    )


def lightning_module(pl, model: nn.Module, seen: list | None = None):
    """What trains ``model``; notes in ``seen`` what a layer is when a batch comes."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            x, target = batch
            return nn.functional.cross_entropy(self.model(x), target)

        def validation_step(self, batch, index):
            assert not self.model.training
            before = {name: value.clone() for name, value in self.model.state_dict().items()}
            plain = network().eval()
            plain.load_state_dict(before)
            torch.testing.assert_close(self.model(batch[0]), plain(batch[0]))
            assert_same_state([self.model.state_dict()], before)
            if seen is not None:
                seen.append([type(layer) for layer in norms(self.model)])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Module()


def norms(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


def shares(rank: int, steps: slice = slice(None)):
    mine = slice(3 * rank, 3 * rank + 3)
    return loader([(x[mine], target[mine]) for x, target in batches(6)[steps]])


def loader(data: list):
    """A list itself would be a list of loaders."""
    return torch.utils.data.DataLoader(data, batch_size=None)


def as_under_torchrun(rank: int, size: int = 2):
    """The environment from which Lightning knows that somebody else has started the ranks."""
    variables = {
        "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",  # nobody listens: the group is there
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
    }
    return mock.patch.dict(os.environ, variables)


def fit(rank, package, folder, strategy="ddp"):
    """Half the steps, a checkpoint, the other half in a new Trainer from it."""
    pl, ours = modules(package)
    seen: list = []
    with as_under_torchrun(rank):
        common = {**SETTINGS, "devices": 2, "strategy": strategy, "num_sanity_val_steps": 1}
        common |= {"use_distributed_sampler": False, "default_root_dir": folder}
        module = lightning_module(pl, network(), seen)
        trainer = pl.Trainer(**common, enable_checkpointing=False, plugins=[ours.SyncBN()])
        trainer.fit(module, shares(rank, slice(10)), shares(rank, slice(1)))
        assert [type(layer) for layer in norms(module)] == CLASSES
        trainer.save_checkpoint(f"{folder}/half.ckpt")

        resumed = lightning_module(pl, network())
        common["max_epochs"] = 2
        trainer = pl.Trainer(**common, enable_checkpointing=False, plugins=[ours.SyncBN()])
        trainer.fit(resumed, shares(rank, slice(10, 20)), ckpt_path=f"{folder}/half.ckpt")
        assert [type(layer) for layer in norms(resumed)] == CLASSES
    inside = [syncbn.SyncBatchNorm2d, syncbn.SyncBatchNorm2d, syncbn.SyncBatchNorm1d]
    assert seen == [inside, inside], "in the sanity check and in the epoch's validation"
    return resumed.model.state_dict()


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_two_ranks_equal_one_process(ranks, package, tmp_path):
    expected = network()
    train(expected, batches(6))
    states = ranks(2, fit, package, str(tmp_path), timeout=120)
    assert_same_state(states, expected.state_dict())


def test_a_saved_checkpoint_has_a_plain_models_names(ranks, tmp_path):
    def save(rank, folder):
        pl, ours = modules("lightning.pytorch")
        with as_under_torchrun(rank):
            trainer = pl.Trainer(
                **{**SETTINGS, "devices": 2, "strategy": "ddp", "default_root_dir": folder},
                plugins=[ours.SyncBN()],
            )
            trainer.fit(lightning_module(pl, network()), shares(rank, slice(2)))
            return trainer.checkpoint_callback.best_model_path

    path, _ = ranks(2, save, str(tmp_path), timeout=120)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert list(state) == [f"model.{name}" for name in network().state_dict()]


def test_options_reach_the_layers_and_ours_stay_ours(ranks):
    def look(rank):
        from syncbn.integrations.lightning import SyncBN

        own = syncbn.SyncBatchNorm2d(6, process_group=syncbn.comm.LOCAL)
        model = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6), own)
        options = {"group_size": 1, "reproducible": True, "skip_nonfinite": True}
        before = own_state(own)
        plugin = SyncBN(where=lambda name, layer: name != "0", **options)
        assert plugin.apply(model) is model
        inside = [type(layer) for layer in model]
        layer = model[1]
        got = (layer.process_group.size, layer.reproducible, layer.skip_nonfinite)
        assert own_state(own) == before
        assert plugin.revert(model) is model
        assert [type(layer) for layer in model[:2]] == [nn.BatchNorm2d] * 2
        assert model[2] is own
        assert type(own) is syncbn.SyncBatchNorm2d
        assert own.process_group is syncbn.comm.LOCAL
        assert own_state(own) == before
        return inside, got

    inside = [nn.BatchNorm2d, syncbn.SyncBatchNorm2d, syncbn.SyncBatchNorm2d]
    assert ranks(2, look) == [(inside, (1, True, True))] * 2


def own_state(layer: nn.Module) -> list:
    """What a plugin must leave as it is: attributes, the names of buffers among them."""
    return [*vars(layer), *layer._buffers, layer.process_group, layer.reproducible]


def test_a_model_of_our_layers_alone_stays_so_without_a_warning(recwarn):
    from syncbn.integrations.lightning import SyncBN

    model = nn.Sequential(syncbn.SyncBatchNorm2d(6))
    before = own_state(model[0])
    plugin = SyncBN(reproducible=True, skip_nonfinite=True)
    plugin.revert(plugin.apply(model))
    assert own_state(model[0]) == before
    assert not recwarn.list


def test_a_where_that_chooses_no_layer_is_told():
    from syncbn.integrations.lightning import SyncBN

    model = nn.Sequential(nn.BatchNorm2d(6), syncbn.SyncBatchNorm2d(6))
    with pytest.warns(UserWarning, match="where chose none of the model's 2 batch norms"):
        SyncBN(where=lambda name, layer: False).apply(model)


def test_a_replicating_wrapper_is_reverted_too():
    from syncbn.integrations.lightning import SyncBN

    theirs = nn.DataParallel(nn.BatchNorm1d(3))
    around_ours = nn.DataParallel(syncbn.SyncBatchNorm1d(3))
    own = syncbn.DataParallel(syncbn.SyncBatchNorm1d(3), ["cpu"])
    model = nn.ModuleList([theirs, around_ours, own])
    plugin = SyncBN()
    plugin.apply(model)
    assert [type(each) for each in model] == [syncbn.DataParallel] * 3
    plugin.revert(model)
    assert [type(each) for each in model] == [nn.DataParallel] * 2 + [syncbn.DataParallel]
    assert "_origin" not in vars(theirs)


def test_one_process_stays_as_it_is():
    pl, ours = modules("lightning.pytorch")
    seen: list = []
    module = lightning_module(pl, network(), seen)
    with as_under_torchrun(0, 1):
        trainer = pl.Trainer(**SETTINGS, enable_checkpointing=False, plugins=[ours.SyncBN()])
        trainer.fit(module, loader(batches(6)), loader(batches(6)[:1]))
    expected = network()
    train(expected, batches(6))
    assert_same_state([module.model.state_dict()], expected.state_dict())
    assert seen == [CLASSES] * 2


def test_a_strategy_that_does_not_apply_it_is_refused(ranks):
    def refused(rank):
        pl, ours = modules("lightning.pytorch")
        from lightning.pytorch.strategies import ModelParallelStrategy

        class Module(type(lightning_module(pl, network()))):
            def configure_model(self):
                pass

        with as_under_torchrun(rank):
            common = {**SETTINGS, "devices": 2, "strategy": ModelParallelStrategy()}
            trainer = pl.Trainer(**common, enable_checkpointing=False, plugins=[ours.SyncBN()])
            trainer.callbacks += [] if installed() else ours.lightning_callbacks()
            with pytest.raises(ValueError, match="SyncBN") as raised:
                trainer.fit(Module(), shares(rank))
        return str(raised.value)

    assert ranks(2, refused, timeout=120) == [
        "SyncBN: expected a strategy that applies LayerSync plugins, as DDPStrategy and "
        f"FSDPStrategy do, got ModelParallelStrategy on rank {rank}; leave the plugin out and call "
        "syncbn.convert(self) in the configure_model of Module"
        for rank in range(2)
    ]


def test_a_strategy_that_knows_no_plugins_is_refused(ranks):
    """A third party's, whose base class is Strategy itself, has no place for one."""

    def refused(rank):
        pl, ours = modules("lightning.pytorch")
        from lightning.pytorch.strategies import DDPStrategy

        class Theirs(DDPStrategy):
            def __getattribute__(self, name):
                if name == "_layer_sync":
                    raise AttributeError(name)
                return super().__getattribute__(name)

            def setup(self, trainer):
                self.model_to_device()

        with as_under_torchrun(rank):
            common = {**SETTINGS, "devices": 2, "strategy": Theirs()}
            trainer = pl.Trainer(**common, enable_checkpointing=False, plugins=[ours.SyncBN()])
            with pytest.raises(ValueError, match="got Theirs on rank"):
                ours._check(None, trainer, lightning_module(pl, network()))

    ranks(2, refused, timeout=120)


BEFORE = """
from syncbn.integrations.lightning import SyncBN
plugin = SyncBN()
import lightning.pytorch, pytorch_lightning
for package in (lightning.pytorch, pytorch_lightning):
    print(isinstance(plugin, package.plugins.LayerSync))
"""


def test_a_plugin_made_before_any_import_is_one_of_every_package():
    (ended,) = execute(BEFORE)
    assert ended.stdout == "True\nTrue\n", ended.stderr


def installed() -> bool:
    """Whether Lightning finds this package's entry points by itself."""
    from importlib.metadata import entry_points

    group = entry_points(group="lightning.pytorch.callbacks_factory")
    return any(each.name == "syncbn" for each in group)


def test_lightning_adds_a_callback_to_those_who_use_the_plugin_alone():
    pl, ours = modules("lightning.pytorch")
    with mock.patch.object(ours.SyncBN, "_made", False):
        assert ours.lightning_callbacks() == ours.pytorch_lightning_callbacks() == []
        plugin = ours.SyncBN()
        (watch,) = ours.lightning_callbacks()
        (other,) = ours.pytorch_lightning_callbacks()
    assert isinstance(watch, pl.Callback)
    assert isinstance(other, importlib.import_module("pytorch_lightning").Callback)
    assert isinstance(pickle.loads(pickle.dumps(watch)), pl.Callback)
    layer_sync = importlib.import_module("lightning.pytorch.plugins").LayerSync
    assert isinstance(pickle.loads(pickle.dumps(plugin)), layer_sync)
    if installed():
        with as_under_torchrun(0, 1):
            trainer = pl.Trainer(**SETTINGS, plugins=[ours.SyncBN()])
        assert [type(each).__name__ for each in trainer.callbacks].count("WatchSyncBN") == 1


def test_lightnings_own_flag_beside_it_is_lightnings_refusal():
    pl, ours = modules("lightning.pytorch")
    refusal = pytest.raises(Exception, match="provided a `SyncBN` plugin, but this is not allowed")
    with as_under_torchrun(0, 1), refusal:
        pl.Trainer(**SETTINGS, plugins=[ours.SyncBN()], sync_batchnorm=True)


def test_lightnings_own_flag_on_a_converted_model_is_told(ranks):
    def told(rank):
        pl, _ = modules("lightning.pytorch")
        with as_under_torchrun(rank):
            common = {**SETTINGS, "devices": 2, "strategy": "ddp", "sync_batchnorm": True}
            trainer = pl.Trainer(**common, enable_checkpointing=False)
            with (
                pytest.warns(UserWarning, match=r"Trainer\(sync_batchnorm=True\) do; leave that"),
                pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"),
            ):
                trainer.fit(lightning_module(pl, syncbn.convert(network())), shares(rank))

    ranks(2, told, timeout=120)


MISSING = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if "lightning" in name else found(name, *rest)
import syncbn
try:
    import syncbn.integrations.lightning
except ImportError as error:
    print(error)
"""


def test_where_lightning_is_missing_the_import_says_what_to_install():
    (ended,) = execute(MISSING)
    assert ended.stdout == (
        "syncbn.integrations.lightning: expected the package lightning or pytorch_lightning, found "
        "neither; pip install lightning\n"
    ), ended.stderr


def test_the_docstrings_example_runs():
    _, ours = modules("lightning.pytorch")
    assert doctest.testmod(ours).failed == 0
    assert "lightning" in sys.modules
