"""Tests of the converter: replaced layers, kept state, refused layers, and tags."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes, run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import (
    BatchNormNd,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    SyncBatchNormAct,
    convert_sync_batchnorm,
    register_conversion,
    revert_sync_batchnorm,
    sync_batchnorm_layers,
    tag_table,
)
from bagua_syncbn_algo import convert as convert_module


class BatchNormAct2d(nn.BatchNorm2d):
    """A layer in timm's style: dropout and activation follow the normalization."""

    def __init__(self, features: int, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(features)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class ActBatchNorm2d(BatchNormAct2d):
    """A layer with the same submodules that activates before it normalizes."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


class GatedBatchNorm2d(nn.BatchNorm2d):
    """A layer with its own forward, for which the converter has no rule."""

    gate = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate


class SyncGatedBatchNorm(SyncBatchNorm):
    gate = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate


class FrozenBatchNorm2d(nn.Module):
    """A frozen layer of detection libraries, which is not derived from BatchNorm."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(features))


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, affine=False)),
    )


def test_keeps_parameters_buffers_and_settings_by_identity() -> None:
    """Catches copied parameters: an optimizer built before the conversion would train unused ones."""
    original = model()
    original[1].weight.requires_grad_(False)
    original[1].eval()
    original[1].custom, original[1].qconfig = "kept", "q"
    before = {**dict(original.named_parameters()), **dict(original.named_buffers())}
    keys = list(original.state_dict())
    converted = convert_sync_batchnorm(original)
    assert converted is original
    after = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
    assert list(converted.state_dict()) == keys
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    layer: Any = converted[1]
    assert type(layer) is SyncBatchNorm2d and (layer.eps, layer.momentum) == (1e-3, 0.2)
    assert (layer.training, layer.custom, layer.qconfig) == (False, "kept", "q")
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert converted[2][1].weight is None and converted[2][1].training


def test_optimizer_built_before_stays_valid() -> None:
    """Catches an optimizer that updates the replaced layer's parameters instead of the new layer's."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    convert_sync_batchnorm(net)
    before = net[1].weight.detach().clone()
    net(torch.randn(2, 3, 4, 4)).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(net[1].weight, before)


def test_hooks_fire_and_can_be_removed() -> None:
    """Catches lost hooks, and handles that refer to the hook dictionary of the replaced layer."""
    net = model()
    fired = []
    handles = [
        net[1].register_forward_pre_hook(lambda m, i: fired.append("pre")),
        net[1].register_forward_hook(lambda m, i, o: fired.append("post")),
    ]
    convert_sync_batchnorm(net)
    net(torch.randn(2, 3, 4, 4))
    assert fired == ["pre", "post"]
    for handle in handles:
        handle.remove()
    net(torch.randn(2, 3, 4, 4))
    assert fired == ["pre", "post"]


def test_a_layer_used_in_several_places_is_converted_once() -> None:
    """Catches two new layers in place of one: their running statistics would diverge."""
    shared = nn.BatchNorm2d(3)
    net = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    convert_sync_batchnorm(net)
    assert net["a"][0] is net["b"] and isinstance(net["b"], SyncBatchNorm)
    assert len(sync_batchnorm_layers(net)) == 1


CLASSES = [
    (nn.BatchNorm1d, SyncBatchNorm1d),
    (nn.BatchNorm2d, SyncBatchNorm2d),
    (nn.BatchNorm3d, SyncBatchNorm3d),
    (nn.SyncBatchNorm, SyncBatchNorm),
    (BatchNormNd, SyncBatchNorm),
]


@pytest.mark.parametrize(("kind", "target"), CLASSES)
def test_a_layer_itself_becomes_a_new_layer_and_back(kind: Any, target: Any) -> None:
    """Catches a root module that is not converted, and a revert to another class."""
    layer = kind(3)
    converted = convert_sync_batchnorm(layer)
    assert type(converted) is target and converted is not layer and converted.weight is layer.weight
    reverted = revert_sync_batchnorm(converted)
    assert type(reverted) is kind and reverted.weight is layer.weight
    assert set(vars(reverted)) == set(vars(layer))


def test_the_class_method_converts_too() -> None:
    """Catches a missing class method, which the layers of upstream and PyTorch have."""
    assert isinstance(SyncBatchNorm.convert_sync_batchnorm(model())[1], SyncBatchNorm)


def test_round_trip_through_evaluation() -> None:
    """Catches a revert that changes results: models are exported and deployed with plain layers."""
    net = model()
    x = torch.randn(2, 3, 4, 4)
    convert_sync_batchnorm(net)(x)
    synchronized = net.eval()(x)
    assert torch.equal(revert_sync_batchnorm(net)(x), synchronized)
    assert not sync_batchnorm_layers(net)


@pytest.mark.multirank
def test_torch_sync_batchnorm_keeps_its_group() -> None:
    """Catches a layer over a subset of ranks that silently becomes a layer over all ranks."""

    def body(rank: int, group: Any) -> Any:
        net = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.BatchNorm1d(3))
        convert_sync_batchnorm(net)
        layer: Any = net[0]
        assert layer.process_group is group and net[1].process_group is None
        reverted: Any = revert_sync_batchnorm(net)[0]
        assert type(reverted) is nn.SyncBatchNorm and reverted.process_group is group
        return layer.tag.group

    assert run_threads(2, body) == [(0, 1), (0, 1)]


@pytest.mark.parametrize("drop", [nn.Identity(), nn.Dropout(0.5)])
def test_fused_activation_is_kept(drop: nn.Module) -> None:
    """Catches an activation that is lost with the replaced layer."""
    net = nn.Sequential(BatchNormAct2d(3, nn.ReLU(), drop))
    plain = copy.deepcopy(net).eval()
    state = copy.deepcopy(net.state_dict())
    convert_sync_batchnorm(net)
    layer: Any = net[0]
    assert type(layer) is SyncBatchNormAct and layer.training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(net.eval()(x), plain(x)) and (plain(x) >= 0).all()
    assert type(revert_sync_batchnorm(net)[0]) is BatchNormAct2d


@pytest.mark.parametrize("layer", [GatedBatchNorm2d(3), ActBatchNorm2d(3, nn.Sigmoid(), nn.Identity())])
def test_an_unknown_forward_is_refused_and_nothing_converted(layer: nn.Module) -> None:
    """Catches a custom forward that is dropped, one taken for timm's by its submodules, and a partial conversion."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(layer))
    with pytest.raises(TypeError, match=r"got 1\.0, a .*BatchNorm2d that overrides forward.*register_conversion"):
        convert_sync_batchnorm(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_registered_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a registered conversion that loses the class's own behaviour or state."""
    monkeypatch.setattr(convert_module, "_conversions", dict(convert_module._conversions))
    register_conversion(GatedBatchNorm2d, SyncGatedBatchNorm)
    net = nn.Sequential(GatedBatchNorm2d(3))
    net[0].gate = 5.0
    x = torch.randn(4, 3, 2, 2)
    expected = net(x).detach()
    net[0].reset_running_stats()
    assert torch.equal(convert_sync_batchnorm(net)(x), expected)
    assert type(revert_sync_batchnorm(net)[0]) is GatedBatchNorm2d
    with pytest.raises(TypeError, match="expected a subclass of SyncBatchNorm"):
        register_conversion(GatedBatchNorm2d, nn.BatchNorm2d)  # type: ignore[arg-type]


def test_a_subclass_without_its_own_forward_is_converted() -> None:
    """Catches a subclass that only adds a check and is refused or not converted."""

    class Checked(nn.BatchNorm2d):
        def _check_input_dim(self, input: Tensor) -> None:
            super()._check_input_dim(input)

    assert isinstance(convert_sync_batchnorm(Checked(3)), SyncBatchNorm2d)


@pytest.mark.parametrize(("kind", "target"), CLASSES[:3])
def test_a_converted_layer_is_still_an_instance_of_its_class(kind: Any, target: Any) -> None:
    """Catches freeze loops and weight decay rules by class that miss converted layers, and a forward of that class."""
    converted = convert_sync_batchnorm(nn.Sequential(kind(3)))[0]
    assert isinstance(converted, kind) and isinstance(converted, SyncBatchNorm)
    assert type(converted).forward is SyncBatchNorm.forward
    assert [type(each) for each in revert_sync_batchnorm(nn.Sequential(target(3), SyncBatchNorm(3)))] == [
        kind,
        BatchNormNd,
    ]


def test_a_second_conversion_changes_nothing() -> None:
    """Catches a converter that takes a converted layer, now an instance of BatchNorm2d, for one to convert."""
    net = convert_sync_batchnorm(model())
    layers = sync_batchnorm_layers(net)
    convert_sync_batchnorm(net)
    assert all(a is b for a, b in zip(layers, sync_batchnorm_layers(net)))
    assert type(revert_sync_batchnorm(net)[1]) is nn.BatchNorm2d


def test_freezing_by_class_works_across_ranks() -> None:
    """Catches a model that a freeze loop written for the plain model does not freeze: its layers would communicate."""
    net = convert_sync_batchnorm(model()).train()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    before = copy.deepcopy(net.state_dict())
    net(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class AnyShape(nn.BatchNorm2d):
    """A subclass that accepts more inputs than the class that it derives from."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def test_a_subclass_keeps_the_inputs_that_it_accepts() -> None:
    """Catches a check of the dimensions that refuses inputs which a subclass accepts, and its loss in a copy."""
    layer = convert_sync_batchnorm(AnyShape(3))
    assert isinstance(layer, SyncBatchNorm2d)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert each(torch.randn(4, 3)).shape == (4, 3)
    assert set(vars(revert_sync_batchnorm(layer))) == set(vars(AnyShape(3)))


class Parallel(nn.Module):
    """Two layers that share a round, so that the forward is regrouped."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x)
        return y


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.nn.SyncBatchNorm needs a GPU before torch 2.0")
@pytest.mark.parametrize("nested", [False, True])
def test_torchs_conversion_of_converted_layers_is_noticed(nested: bool) -> None:
    """Catches a model that silently trains with PyTorch's layers, as with sync_batchnorm=True in Lightning."""
    net = convert_sync_batchnorm(nn.Sequential(Parallel(), nn.Flatten(0, 0)) if nested else Parallel())
    x = torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    name = "Sequential.0" if nested else "Parallel"
    expected = (
        rf"got torch.nn.SyncBatchNorm at {name}\.a, {name}\.b.*convert_sync_batchnorm\(model\) of bagua_syncbn_algo"
    )
    with pytest.warns(UserWarning, match=expected):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)  # warned once
        convert_sync_batchnorm(net)(x)  # the remedy
    assert len(sync_batchnorm_layers(net)) == 2


@pytest.mark.parametrize("group", [[0, 1], "world", 2, torch.tensor([0, 1])], ids=str)
def test_a_list_of_ranks_is_no_process_group(group: Any) -> None:
    """Catches an error in the middle of the conversion, such as that a list is not hashable."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    for build in (lambda: convert_sync_batchnorm(model, group), lambda: SyncBatchNorm(2, process_group=group)):
        with pytest.raises(TypeError, match=r"expected a process group or None .*torch.distributed.new_group\(ranks\)"):
            build()
    assert type(model[0]) is nn.BatchNorm1d


def _without_values(rank: int) -> Any:
    from torch._subclasses import FakeTensorMode

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    dist.init_process_group("gloo")
    shapes = []
    with FakeTensorMode():
        for model in (convert_sync_batchnorm(build()), convert_sync_batchnorm(build(), coalesce=False)):
            output = model(torch.randn(2 + rank, 3, 5, 5))
            output.sum().backward()
            shapes.append(tuple(output.shape))
    with torch.device("meta"):
        model = convert_sync_batchnorm(build())
    if rank == 0:  # a rank may look at shapes alone
        shapes.append(tuple(model(torch.empty(2, 3, 5, 5, device="meta")).shape))
    torch.manual_seed(0)
    model = convert_sync_batchnorm(build())
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    return shapes, model[1].running_mean


@pytest.mark.multirank
def test_tensors_without_values_are_not_sent() -> None:
    """Catches a fake tensor in a message or in a random generator: each ended the process."""
    (first, mean), (second, other) = run_processes(2, _without_values)
    assert first == [(2, 4, 5, 5)] * 3 and second == [(3, 4, 5, 5)] * 2
    assert torch.equal(mean, other) and mean.any()


def _meshes(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    wide = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    unnamed = init_device_mesh("cpu", (1, 2))
    net = model()
    refused = []
    for each in (wide, unnamed):
        for use in (lambda g: convert_sync_batchnorm(net, g), lambda g: SyncBatchNorm(3, process_group=g)):
            try:
                use(each)
            except ValueError as error:
                refused.append(str(error))
    unchanged = type(net[1]) is nn.BatchNorm2d
    means = []
    for each in (mesh, wide["dp"], wide["tp"]):
        layer = convert_sync_batchnorm(nn.BatchNorm1d(1, momentum=1.0), each)
        layer(torch.tensor([[0.0], [2.0]]) + 10 * rank)
        means.append(layer.running_mean.item())  # type: ignore[union-attr]
    return refused, unchanged, means, SyncBatchNorm(3, process_group=mesh).process_group is mesh.get_group()


@pytest.mark.multirank
def test_a_device_mesh_is_a_process_group() -> None:
    """Catches a mesh that fails at the first forward, and one of several dimensions of which any is used."""
    for rank, (refused, unchanged, means, is_group) in enumerate(run_processes(2, _meshes)):
        assert len(refused) == 4 and unchanged and is_group
        for message in refused[:2]:
            assert "got 2 dimensions named dp, tp" in message and 'process_group=mesh["dp"]' in message
        for message in refused[2:]:
            assert "got 2 dimensions)" in message and "mesh.get_group(0)" in message
        assert means == [6.0, 6.0, 1.0 + 10 * rank]


def test_the_type_of_the_model_is_kept() -> None:
    """Catches a converter typed to return any module: mypy would then reject attributes of the model's class."""
    parallel: Parallel = convert_sync_batchnorm(Parallel())
    reverted: Parallel = revert_sync_batchnorm(parallel)
    assert type(reverted.a) is nn.BatchNorm2d


def test_lazy_layers() -> None:
    """Catches an unmaterialised layer that is converted without a shape, and a materialised one that is refused."""
    net = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"got 0, an uninitialized LazyBatchNorm2d.*run one batch"):
        convert_sync_batchnorm(net)
    net(torch.randn(2, 3, 4, 4))
    assert isinstance(convert_sync_batchnorm(net)[0], SyncBatchNorm)


def test_others_stay() -> None:
    """Catches a conversion of layers that do not normalize over the batch."""
    net = nn.Sequential(nn.InstanceNorm2d(3), FrozenBatchNorm2d(3), nn.GroupNorm(1, 3))
    kinds = [type(layer) for layer in net]
    convert_sync_batchnorm(net)
    assert [type(layer) for layer in net] == kinds


def test_checkpoints_load_both_ways() -> None:
    """Catches state_dict keys or shapes that differ from BatchNorm's and torch's SyncBatchNorm's."""
    for source in (nn.BatchNorm2d(3), nn.SyncBatchNorm(3)):
        layer = SyncBatchNorm(3)
        source.running_mean.fill_(3.0)
        layer.load_state_dict(source.state_dict())
        assert layer.running_mean is not None and layer.running_mean[0] == 3.0
        source.load_state_dict(layer.state_dict())


def test_dtype_and_device_are_kept() -> None:
    """Catches a new layer with the default dtype or device."""
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3, dtype=torch.float64, device="meta"))
    assert layer.weight.dtype == torch.float64 and layer.weight.device.type == "meta"  # type: ignore[union-attr]


def test_tags_and_their_table() -> None:
    """Catches tags whose names, order or groups differ from the model's."""
    net = convert_sync_batchnorm(model())
    tags = [layer.tag for layer in sync_batchnorm_layers(net)]
    assert [(tag.name, tag.order, tag.group) for tag in tags if tag] == [
        ("Sequential.1", 0, None),
        ("Sequential.2.1", 1, None),
    ]
    assert tag_table(net).splitlines() == [
        "order  layer           features  normalizes over",
        "    0  Sequential.1           4  all ranks",
        "    1  Sequential.2.1         4  all ranks",
    ]


def test_convert_after_with_bagua_is_refused() -> None:
    """Catches layers replaced after with_bagua: the algorithm would remain bound to the old layers."""
    net = model()
    net.bagua_ddp = object()  # type: ignore[assignment]  # the attribute that with_bagua sets
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        with pytest.raises(RuntimeError, match="before with_bagua"):
            change(nn.ModuleList([net]))
