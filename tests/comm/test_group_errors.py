"""Process groups that a layer cannot use are refused; groups of one rank work until destroyed."""

import json

import pytest
import torch.distributed as dist

import syncbn
from support.scripts import execute

PROGRAM = """
import json, sys
import torch, torch.distributed as dist, syncbn
from torch.distributed.device_mesh import init_device_mesh

answers, x = {}, torch.randn(4, 3, 2, 2)

def note(name, call):
    try:
        answers[name] = ["no error", str(call())]
    except Exception as error:
        answers[name] = [type(error).__name__, str(error)]

def start(number):
    store = dist.FileStore(f"{sys.argv[1]}/store{number}", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)

def layer(given):
    return syncbn.SyncBatchNorm2d(3, process_group=given)

outsider = dist.GroupMember.NON_GROUP_MEMBER
note("default before init", lambda: layer(None)(x).shape)
start(1)
note("non-member layer", lambda: layer(outsider))
note("non-member lazy", lambda: syncbn.LazySyncBatchNorm2d(process_group=outsider))
note("non-member convert", lambda: syncbn.convert(torch.nn.BatchNorm2d(3), outsider))
note("non-member call", lambda: syncbn.sync_batch_norm(x, None, None, group=outsider))
flat = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
grid = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
unnamed = init_device_mesh("cpu", (1, 1))
note("grid", lambda: layer(grid))
note("unnamed grid", lambda: layer(unnamed))
groups = {"flat": flat, "row": grid["tp"], "group": dist.new_group([0]), "world": dist.group.WORLD}
layers = {name: layer(given) for name, given in groups.items()}
for name, built in layers.items():
    note(name, lambda: built(x).shape)
    note("repr of " + name, built.extra_repr)
dist.destroy_process_group()
for name, built in layers.items():
    note("destroyed " + name, lambda: built(x))
    note("destroyed eval " + name, lambda: built.eval()(x).shape)
    note("repr of destroyed " + name, built.extra_repr)
    note("new layer on destroyed " + name, lambda: layer(groups[name]))
note("default after destroy", lambda: layer(None)(x).shape)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What layers with torch's groups answer, in a process of its own with a group of one."""
    (done,) = execute(PROGRAM, str(tmp_path_factory.mktemp("group")))
    assert done.code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["layer", "lazy", "convert", "call"])
def test_a_group_that_this_rank_is_not_in(answers, case):
    error, text = answers["non-member " + case]
    assert error == "ValueError"
    assert text.startswith("process_group: rank 0 is not in the group given; pass None (the ")


def test_a_group_that_this_rank_is_not_in_before_initialisation():
    text = r"^process_group: got .*, but the default group is not initialised \(or was destroyed\)"
    with pytest.raises(ValueError, match=text):
        syncbn.SyncBatchNorm2d(3, process_group=dist.GroupMember.NON_GROUP_MEMBER)


@pytest.mark.parametrize("case", ["grid", "unnamed grid"])
def test_a_mesh_of_two_dimensions(answers, case):
    error, text = answers[case]
    assert error == "ValueError"
    assert "process_group: expected a one-dimensional DeviceMesh, got 2 dimensions" in text
    assert ("('dp', 'tp')" if case == "grid" else "(1, 1)") in text
    assert "mesh['dp']" in text


@pytest.mark.parametrize("name", ["flat", "row", "group", "world"])
def test_groups_of_one_rank_work_and_fail_once_destroyed(answers, name):
    shape = ["no error", "torch.Size([4, 3, 2, 2])"]
    assert answers[name] == answers["destroyed eval " + name] == shape
    for case in ("destroyed ", "new layer on destroyed "):
        error, text = answers[case + name]
        assert error == "ValueError"
        assert text.startswith("process_group: got a ")
        assert "not initialised (or was destroyed)" in text
        assert "torch.distributed.init_process_group" in text


@pytest.mark.parametrize("name", ["flat", "row", "group", "world"])
def test_repr_works_with_and_without_the_group_alive(answers, name):
    error, text = answers["repr of " + name]
    assert (error, "world_size=1" in text) == ("no error", True)
    if name in ("group", "world"):  # a mesh of one rank may or may not be the default group
        assert ("group_size=1" in text) == (name == "group"), "only where not the default group"
    assert answers["repr of destroyed " + name][0] == "no error"


@pytest.mark.parametrize("when", ["before init", "after destroy"])
def test_the_default_group_is_optional(answers, when):
    assert answers["default " + when] == ["no error", "torch.Size([4, 3, 2, 2])"]
